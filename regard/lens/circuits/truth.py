"""Circuits that others have published, head by head: what a list found here is held against.

    ioi               GPT-2 small, and GPT-2 medium             indirect objects
    colored_objects   GPT-2 medium                              the heads it has beside those of "ioi"
    greater_than      GPT-2 small                               later years
    docstring         attn-only-4l, four layers of eight heads  arguments of a function

A task may have several versions, which differ in a few heads; the first of each is the default.

Sources: Wang et al., 2023, arXiv 2211.00593 ("wang"), of which the code of O'Neill and Bui, 2024, arXiv
2405.12522 ("oneill"), has 11.3 in place of 9.0; Merullo et al., 2024, arXiv 2310.08744 ("merullo"); Hanna et
al., 2023, arXiv 2305.00586 ("hanna"); Conmy et al., 2023, arXiv 2304.14997 ("acdc"); Heimersheim and Janiak,
2023 ("heimersheim"). Status: copied from there, no claim of ours that the lists are complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regard.errors import RegardError

Numbered = tuple[int, int]


@dataclass(frozen=True)
class KnownCircuit:
    """A published circuit.

    Attributes:
        task, version: its name here.
        model: on the Hugging Face hub, or in TransformerLens.
        shape: (layers, heads a layer) of that model.
        roles: role -> (layer, head) of its members.
        mlps: layers whose MLPs belong to it, where the source says so.
        source: authors, year and arXiv id.
    """

    task: str
    version: str
    model: str
    shape: tuple[int, int]
    roles: Mapping[str, tuple[Numbered, ...]]
    mlps: tuple[int, ...] = ()
    source: str = field(default="", repr=False)

    @property
    def heads(self) -> list[Numbered]:
        """All its heads, (layer, head), in ascending order."""
        return sorted({head for members in self.roles.values() for head in members})

    def roles_of(self, head: Numbered) -> list[str]:
        """Return the roles that a head has in it; none where it is no member."""
        return [role for role, members in self.roles.items() if head in members]


def _heads(text: str) -> tuple[Numbered, ...]:
    """Read "9.9 10.0" as ((9, 9), (10, 0))."""
    pairs = (one.split(".") for one in text.split())
    return tuple((int(layer), int(head)) for layer, head in pairs)


_SMALL, _MEDIUM, _DOCSTRING = ("gpt2", (12, 12)), ("gpt2-medium", (24, 16)), ("attn-only-4l", (4, 8))
_WANG = {
    "mover": _heads("9.9 10.0 9.6"),
    "backup mover": _heads("10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9"),
    "negative mover": _heads("10.7 11.10"),
    "inhibition": _heads("7.3 7.9 8.6 8.10"),
    "induction": _heads("5.5 5.8 5.9 6.9"),
    "duplicate": _heads("0.1 0.10 3.0"),
    "previous": _heads("2.2 4.11"),
}
_ONEILL = {**_WANG, "backup mover": _heads("10.10 10.6 10.2 10.1 11.2 9.7 11.3 11.9")}
_MERULLO = {
    "mover": _heads("15.14 16.15 17.4 18.5 19.15"),
    "negative mover": _heads("19.1"),
    "inhibition": _heads("12.3 13.4 13.13"),
    "induction": _heads("9.3"),
    "duplicate": _heads("6.4"),
}
_COLOURED = {
    "mover": _heads("15.14 16.15 17.4 18.5 19.15"),
    "gatherer": _heads("11.6 11.7 12.15"),
    "early": _heads("6.15 7.2 7.11 8.15"),
}
_IOI_PAPER = "Wang et al., 2023, arXiv 2211.00593"
_REUSE_PAPER = "Merullo et al., 2024, arXiv 2310.08744"
_SAE_PAPER = "O'Neill and Bui, 2024, arXiv 2405.12522"
_ACDC_PAPER = "Conmy et al., 2023, arXiv 2304.14997"
_YEARS_PAPER = "Hanna et al., 2023, arXiv 2305.00586"
_DOCSTRING_POST = "Heimersheim and Janiak, 2023"
KNOWN = (
    KnownCircuit("ioi", "wang", *_SMALL, _WANG, (), _IOI_PAPER),
    KnownCircuit("ioi", "oneill", *_SMALL, _ONEILL, (), _SAE_PAPER),
    KnownCircuit("ioi", "merullo", *_MEDIUM, _MERULLO, (), _REUSE_PAPER),
    KnownCircuit("colored_objects", "merullo", *_MEDIUM, _COLOURED, (), _REUSE_PAPER),
    KnownCircuit(
        "greater_than", "acdc", *_SMALL, {"circuit": _heads("0.1 0.3 0.5 5.5 6.1 6.9 7.10 8.11 9.1")},
        (0, 1, 2, 3, 8, 9, 10, 11), _ACDC_PAPER,
    ),
    KnownCircuit(
        "greater_than", "hanna", *_SMALL, {"feeds MLPs": _heads("9.1 8.11 7.10 6.9 5.5 8.8 5.1")}, (),
        _YEARS_PAPER,
    ),
    KnownCircuit(
        "docstring", "acdc", *_DOCSTRING, {"circuit": _heads("0.5 1.2 1.4 2.0 3.0 3.6")}, (), _ACDC_PAPER
    ),
    KnownCircuit(
        "docstring", "oneill", *_DOCSTRING, {"circuit": _heads("0.5 1.0 1.4 2.0 3.0 3.6")}, (), _SAE_PAPER
    ),
    KnownCircuit(
        "docstring", "heimersheim", *_DOCSTRING, {"circuit": _heads("0.2 0.4 0.5 1.2 1.4 2.0 3.0 3.6")}, (),
        _DOCSTRING_POST,
    ),
)  # fmt: skip


def known_circuit(task: str, version: str | None = None) -> KnownCircuit:
    """Return a published circuit by the name of its task.

    Args:
        task: `ioi`, `colored_objects`, `greater_than` or `docstring`.
        version: whose list; default the first that is known.

    Raises:
        RegardError: for a task or version that is not known, naming those that are.

    Example:
        >>> known_circuit("ioi").roles["inhibition"]
        ((7, 3), (7, 9), (8, 6), (8, 10))
        >>> len(known_circuit("greater_than").heads)
        9
    """
    found = {each.version: each for each in KNOWN if each.task == task}
    if not found:
        tasks = ", ".join(dict.fromkeys(each.task for each in KNOWN))
        raise RegardError(f"no published circuit of {task!r} is known; there is {tasks}.")
    if version is not None and version not in found:
        raise RegardError(f"the circuit of {task} has no version {version!r}; it has {', '.join(found)}.")
    return next(iter(found.values())) if version is None else found[version]

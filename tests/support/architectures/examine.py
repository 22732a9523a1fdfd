"""One architecture, plain and watched: the verdict, and what it rests on."""

from __future__ import annotations

import time
import traceback
from typing import Any

import torch

import regard
from regard.errors import RegardError
from tests.support.architectures import compare
from tests.support.architectures.build import Tiny, tiny
from tests.support.architectures.compare import Rows, distance, eager_weights
from tests.support.architectures.families import FAMILIES
from tests.support.architectures.family import Family
from tests.support.architectures.inputs import fresh
from tests.support.architectures.listing import architectures

RELATIVE = 1e-5


def examine(name: str) -> dict[str, Any]:
    """Run one architecture, and return a row: `verdict` is works, refused, wrong, differs or not built."""
    began = time.perf_counter()
    row: dict[str, Any] = {"name": name, "class": "", "verdict": "not built", "reason": ""}
    try:
        case = tiny(architectures()[name])
        row["class"] = type(case.model).__name__
        plain = _plain(case, row)
    except Exception as error:
        row["reason"] = FAMILIES.get(name, Family()).impossible or _words(error)
        row["trace"] = traceback.format_exc()[-1500:]
    else:
        try:
            _watched(case, plain, row)
        except RegardError as error:
            row.update(verdict="refused", reason=_words(error))
        except Exception as error:
            row.update(verdict="wrong", reason=f"watched, it raises {_words(error)}")
            row["trace"] = traceback.format_exc()[-1500:]
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def forward(case: Tiny, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(11)
    with torch.no_grad():
        return case.model(**fresh(inputs), **options)


def _plain(case: Tiny, row: dict[str, Any]) -> dict[str, Any]:
    """Run the model by its own attention: a forward, one padded, one that gives attentions, a generate."""
    inputs = case.fit()
    with eager_weights(case.model) as eager:
        output = forward(case, inputs)
    if not compare.finite(output):
        raise ValueError("the plain output is not finite")
    if not torch.isfinite(torch.tensor(distance(forward(case, inputs), output)[0])):
        raise ValueError("the plain output is not repeatable")
    plain: dict[str, Any] = {"inputs": inputs, "output": output, "eager": dict(eager)}
    for key, make in (("padded", _padded), ("attentions", _attentions), ("generated", _generated)):
        try:
            made = make(case, plain)
        except Exception as error:
            row[f"no_{key}"] = _words(error)
            continue
        if made is not None:
            plain[key] = made
    return plain


def _padded(case: Tiny, plain: dict[str, Any]) -> Any:
    inputs = case.inputs(padding=True)
    if "attention_mask" not in inputs:
        return None
    output = forward(case, inputs)
    if not compare.finite(output, inputs["attention_mask"]):
        raise ValueError("not finite when padded")
    return inputs, output


def _attentions(case: Tiny, plain: dict[str, Any]) -> Any:
    output = forward(case, plain["inputs"], output_attentions=True)
    return compare.attentions(output) or None


def _generated(case: Tiny, plain: dict[str, Any]) -> Any:
    if not case.generates:
        return None
    inputs = case.inputs(padding=True)
    with torch.no_grad():
        return inputs, generate(case, inputs)


def generate(case: Tiny, inputs: dict[str, Any]) -> Any:
    inputs = fresh({key: value for key, value in inputs.items() if not key.startswith("decoder_")})
    torch.manual_seed(11)
    with torch.no_grad():
        return case.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )


def _watched(case: Tiny, plain: dict[str, Any], row: dict[str, Any]) -> None:
    before = _state(case.model)
    row["notes"] = [f"generate() fails by itself: {row['no_generated']}"] if "no_generated" in row else []
    inputs = plain["inputs"]
    off: dict[str, tuple[float, str]] = {}
    with regard.watch(case.model) as idle:
        off["idle"] = distance(forward(case, inputs), plain["output"])
    with regard.watch(case.model, Rows()) as seen:
        off["opened"] = distance(forward(case, inputs), plain["output"])
    shown = seen[Rows]
    aliases = {site.name: site.alias for site in seen.sites}
    row.update(sites=len(seen.sites), silent=seen.silent, unreachable=seen.unreachable)
    row["restored"] = (
        _state(case.model) == before and distance(forward(case, inputs), plain["output"])[0] == 0
    )
    problems = [] if row["restored"] else ["the model is not restored"]
    off["weights"], missing, sinks = _weights_off(plain["eager"], shown, aliases)
    problems += missing
    row["calls"] = sum(len(calls) for calls in plain["eager"].values())
    if set(seen.silent) != set(idle.silent):
        problems.append("idle and opened reach other sites")
    if "padded" in plain:
        padded_inputs, padded = plain["padded"]
        with regard.watch(case.model, Rows()):
            off["padded"] = distance(forward(case, padded_inputs), padded, padded_inputs["attention_mask"])
    if sinks:
        row["notes"].append(
            "the model returns weights without the part that its sinks take; a lens sees them with it"
        )
    elif "attentions" in plain:
        with regard.watch(case.model, Rows()):
            again = compare.attentions(forward(case, inputs, output_attentions=True))
        off["attentions"] = distance(again, plain["attentions"])
    if "generated" in plain:
        given, expected = plain["generated"]
        with regard.watch(case.model, Rows()):
            off["generated"] = distance(generate(case, given), expected)
    if _can_be_sdpa(case):
        off["sdpa"], notes = _beside_sdpa(case, plain)
        row["notes"] += notes
    row["off"] = {key: float(f"{value:.2g}") for key, (value, _) in off.items()}
    far = {key: where for key, (value, where) in off.items() if not value <= RELATIVE}
    problems += [f"{key} differs by {off[key][0]:.1e} in {where}" for key, where in far.items()]
    row["verdict"], row["reason"] = ("wrong", "; ".join(problems)) if problems else ("works", "")


def _weights_off(
    eager: dict[str, list[Any]], shown: dict[str, list[Any]], aliases: dict[str, str]
) -> tuple[tuple[float, str], list[str], bool]:
    """Compare the weights that eager attention computed, call by call, with those that the lens was shown.

    Returns:
        The largest difference and its site; what is missing; whether only the part of sinks is.
    """
    worst, problems, sinks = (0.0, ""), [], False
    for name, calls in eager.items():
        alias = aliases.get(name)
        kept = shown.get(alias or "", [])
        if alias is None:
            problems.append(f"{name} computes attention and is no site")
        elif len(kept) != len(calls):
            problems.append(f"{alias} was called {len(calls)} times and seen {len(kept)} times")
        else:
            for (mine, valid), theirs in zip(kept, calls, strict=True):
                if theirs is None:
                    continue
                if theirs.shape != mine.shape:
                    problems.append(f"{alias} shows weights {tuple(mine.shape)}, eager {tuple(theirs.shape)}")
                    continue
                rows = 1.0 if valid is None else valid[:, None, :, None].float()
                off = _largest((mine - theirs.float()) * rows)
                shared = _largest((mine / mine.sum(-1, keepdim=True) - theirs.float()) * rows)
                if off > RELATIVE >= shared:
                    off, sinks = shared, True
                worst = max(worst, (off, alias))
    return worst, problems[:3], sinks


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def _can_be_sdpa(case: Tiny) -> bool:
    try:
        case.model.set_attn_implementation("sdpa")
    except ValueError:
        return False
    return case.has_sdpa


def _beside_sdpa(case: Tiny, plain: dict[str, Any]) -> tuple[tuple[float, str], list[str]]:
    """The same once more where the model was loaded with SDPA attention."""
    worst, notes = (0.0, ""), []
    for inputs, eager in ((plain["inputs"], plain["output"]), plain.get("padded", ({}, None))):
        if inputs:
            expected = forward(case, inputs)
            with regard.watch(case.model, Rows()):
                found = forward(case, inputs)
            mask = inputs["attention_mask"] if inputs is not plain["inputs"] else None
            off = distance(found, expected, mask)
            if off[0] > RELATIVE >= distance(found, eager, mask)[0]:
                notes = [
                    f"its own eager and SDPA attention differ by {off[0]:.0e} when padded; watched: eager"
                ]
            else:
                worst = max(worst, off)
    return worst, notes


def _state(model: Any) -> Any:
    """What a session touches of a model, to be found unchanged after it."""
    modules = {
        name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    implementations = [
        getattr(c, "_attn_implementation_internal", None)
        for module in model.modules()
        if (c := getattr(module, "config", None)) is not None
    ]
    return modules, implementations

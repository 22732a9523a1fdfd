"""What a row of the catalogue claims, held against what is there: sentences about each thing that is not."""

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

from regard.errors import RegardError
from regard.papers import STATES

NAME = re.compile(r"regard(\.\w+)+:\w+")


def kinds():
    """For each kind of system, what one of its public names must be."""
    from torch import nn

    from regard.attention.registry import Spec
    from regard.runtime.protocol import Edit, Lens

    return {
        "mechanism": (Spec, nn.Module, Edit),
        "measurement": (Lens, nn.Module),
        "edit": (Edit,),
        "architecture": (nn.Module,),
        "objective": (object,),
        "evaluation": (object,),
        "prompting": (object,),
        "theory": (object,),
    }


def row_faults(paper):
    """What is wrong with a row by itself."""
    named = [paper.code, paper.command, paper.study, paper.tests]
    if paper.state not in STATES:
        yield f"state {paper.state!r} is none of {', '.join(STATES)}"
    if paper.state == "planned" and any(named):
        yield "is planned, and names code, a command, a study or tests"
    if paper.state == "works" and not all((paper.code, paper.study, paper.tests)):
        yield "works, and lacks code, a study or tests"
    if paper.state == "partly" and not all((paper.code, paper.tests)):
        yield "works partly, and lacks code or tests"
    if (paper.missing is not None) != (paper.state == "partly"):
        yield "says what is missing if and only if it works partly"


def code_faults(paper):
    """Names that do not import, or are not of the kind and in the folder that the row says."""
    found = []
    for name in [*paper.code, *filter(None, [paper.command])]:
        if not NAME.fullmatch(name):
            yield f"{name} is not of the form regard.module:name"
            continue
        module, attribute = name.split(":")
        try:
            thing = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            yield f"{name} does not import: {error}"
            continue
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield f"{name} is no class or function"
        elif name != paper.command:
            found.append(thing)
        elif len(inspect.signature(thing).parameters) != 1 or not inspect.getdoc(thing):
            yield f"{name} is no command: it takes a parser, and its docstring is its help"
    wanted = kinds()[paper.kind]
    fits = [t for t in found if wanted == (object,) or (inspect.isclass(t) and issubclass(t, wanted))]
    if paper.code and not any(t.__module__.startswith(f"regard.{paper.area}.") for t in fits):
        yield f"none of {', '.join(paper.code)} is a {paper.kind} in regard/{paper.area}/"


def test_faults(paper, outcomes_of, root):
    """Test files that do not exist, have no test that passed, or one that failed."""
    absent = [file for file in paper.tests if not (Path(root) / file).is_file()]
    yield from (f"there is no file {file}" for file in absent)
    for file, counts in outcomes_of([f for f in paper.tests if f not in absent]).items():
        told = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        if counts["failed"] or not counts["passed"]:
            yield f"{file}: {told}"


def study_faults(paper, results):
    """A study that is not registered, or has no outcome of a full run by the rules that it has now."""
    from regard.studies import find_study, read_outcome

    if paper.study is None:
        return
    path = Path(results) / f"{paper.study}.json"
    try:
        study = find_study(paper.study)
        outcome = read_outcome(path)
    except RegardError as error:
        yield str(error)
        return
    if outcome.study != paper.study:
        yield f"{path.name} is an outcome of {outcome.study}"
    elif outcome.quick or outcome.size != json.loads(json.dumps(dataclasses.asdict(study.full))):
        yield f"{path.name} is no outcome of a full run: its size is {outcome.size}"
    elif not outcome.rules_first:
        yield f"{path.name}: the rules were changed after the first step had run"
    elif not _judged_alike(study, outcome):
        yield f"{path.name}: the study's rules, on the values in it, give other verdicts"


def _judged_alike(study, outcome):
    """Whether a study's rules as they are now give an outcome's verdicts, from its values."""
    from regard.studies.base import by_name
    from regard.studies.verdict import judge

    def told(claims):
        rules = [[(rule["text"], rule["verdict"]) for rule in (*c["needs"], *c["rules"])] for c in claims]
        return [(c["name"], c["text"], c["verdict"], r) for c, r in zip(claims, rules, strict=True)]

    values = {name: measure["values"] for name, measure in outcome.measures.items()}
    try:
        verdict, claims, _ = judge(study.claims, by_name(study.quantities), values)
    except RegardError:
        return False
    return (verdict, told(claims)) == (outcome.verdict, told(outcome.claims))


def page_faults(paper, root):
    """A system that works without a page, or a page of one that does not."""
    there = (Path(root) / "docs" / "systems" / f"{paper.slug}.md").is_file()
    if there != (paper.state != "planned"):
        yield f"is {paper.state}, and has {'a' if there else 'no'} page docs/systems/{paper.slug}.md"

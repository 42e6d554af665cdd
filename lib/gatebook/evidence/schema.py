"""The schema of `chapters/SLUG.yml`: claims, tests, scales and ambiguities of one paper."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gatebook.errors import unknown

Scale = Literal["small", "medium", "full"]
SCALES: tuple[str, ...] = ("small", "medium", "full")


class ChapterError(ValueError):
    """A chapter's `.yml` is malformed; the message names file, line and field."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Test(_Strict):
    """One pre-declared test: which numbers are compared, and what would support or refute."""

    __test__ = False  # not a pytest class

    id: str
    scales: list[Scale] = Field(min_length=1)
    metric: str
    unit: str
    left: str
    right: str | None = None
    statistic: Literal["difference", "ratio", "value"]
    direction: Literal["greater", "less", "within", "equal"]
    margin: float | None = None
    expected: float | None = None
    tolerance: float = Field(default=0.0, ge=0)
    at_paper_configuration: bool = False
    exact: bool = False  # numbers without chance, such as counts: one is enough
    rationale: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> "Test":
        if (self.right is None) != (self.statistic == "value"):
            raise ValueError("`difference` and `ratio` need `right`; `value` must not have it")
        if self.exact and (self.direction not in ("greater", "less") or self.statistic != "value"):
            raise ValueError("`exact` goes with `greater` or `less` and `statistic: value`")
        if self.direction == "equal":
            if self.expected is None or self.statistic != "value" or self.margin is not None:
                raise ValueError("`equal` needs `statistic: value` and `expected`, and no `margin`")
            return self
        if self.margin is None or self.expected is not None:
            raise ValueError(f"`{self.direction}` needs `margin` and must not have `expected`")
        if not self.rationale:
            raise ValueError("`rationale` must say why the margin is what it is")
        if self.direction == "within" and (self.margin <= 0 or self.statistic == "ratio"):
            raise ValueError("`within` needs a positive margin and no ratio")
        if self.tolerance:
            raise ValueError("`tolerance` belongs to `equal`")
        if self.at_paper_configuration and not self.exact:
            raise ValueError("`at_paper_configuration` belongs to `equal` or `exact`")
        return self

    @property
    def by_chance(self) -> bool:
        """Whether the numbers vary from seed to seed, so that the rule needs an interval."""
        return self.direction != "equal" and not self.exact

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms whose numbers the test compares."""
        return (self.left,) if self.right is None else (self.left, self.right)


class Claim(_Strict):
    """One claim of the paper and the tests that bear on it."""

    id: str = Field(pattern=r"^C\d+$")
    statement: str
    where: str
    paper: str
    tests: list[Test] = []
    not_tested: str = ""
    price: str = ""

    @model_validator(mode="after")
    def _explained(self) -> "Claim":
        if not self.tests and not self.not_tested:
            raise ValueError("a claim without tests needs `not_tested`: why no test is possible")
        return self


class ScalePlan(_Strict):
    """What a scale runs: data, seeds, cost, and the chapter's own settings."""

    description: str
    dataset: str
    device: Literal["cpu", "cuda"]
    seeds: int = Field(ge=1)
    settings: dict[str, Any]
    minutes: float | None = Field(default=None, gt=0)
    gpu_hours: float | None = Field(default=None, gt=0)
    gpus: int | None = Field(default=None, ge=1)
    data_gb: float | None = Field(default=None, ge=0)
    source: str = ""


class Ambiguity(_Strict):
    """What the paper leaves out or says wrongly, what we chose, what difference it makes."""

    what: str
    choice: str
    effect: str


class Chapter(_Strict):
    """The whole file."""

    slug: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    authors: list[str] = Field(min_length=1)
    year: int
    arxiv: str | None = Field(default=None, pattern=r"^\d{4}\.\d{4,5}$")
    venue: str
    code: list[str]
    part: str
    thin: bool = False
    claims: list[Claim] = Field(min_length=1)
    scales: dict[Scale, ScalePlan]
    ambiguities: list[Ambiguity]

    @model_validator(mode="after")
    def _unique(self) -> "Chapter":
        missing = [scale for scale in SCALES if scale not in self.scales]
        if missing:
            raise ValueError(f"`scales` lacks {missing}")
        for kind, ids in (
            ("claim", [claim.id for claim in self.claims]),
            ("test", [test.id for test in self.tests()]),
        ):
            twice = sorted({name for name in ids if ids.count(name) > 1})
            if twice:
                raise ValueError(f"{kind} ids appear twice: {twice}")
        return self

    def tests(self, scale: str | None = None) -> list[Test]:
        """All tests, or those that run at one scale."""
        return [
            test
            for claim in self.claims
            for test in claim.tests
            if scale is None or scale in test.scales
        ]

    def claim(self, claim_id: str) -> Claim:
        """A claim by id.

        Raises:
            ValueError: no such claim; the message lists those that exist.
        """
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        raise ValueError(unknown(f"claim of {self.slug}", claim_id, [c.id for c in self.claims]))


def load(path: str | Path) -> Chapter:
    """Read and validate a chapter's `.yml`.

    Raises:
        FileNotFoundError: there is no such file.
        ChapterError: malformed YAML or a wrong field; one line each, `file:line: field: problem`.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ChapterError(f"{path.name}:{line}: not UTF-8: {error.reason}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ChapterError(f"{path.name}{line}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ChapterError(f"{path.name}:1: the file must hold fields such as `slug:`")
    twice = [f"{path.name}:{line}: {key}: given twice" for key, line in _given_twice(node, set())]
    if twice:
        raise ChapterError("\n".join(twice))
    try:
        chapter = Chapter.model_validate(data)
    except ValidationError as error:
        lines = [_describe(path, node, item) for item in error.errors()]
        raise ChapterError("\n".join(lines)) from None
    if chapter.slug != path.stem:
        raise ChapterError(f"{path.name}: slug: is {chapter.slug!r}, but the file is {path.name}")
    return chapter


def _given_twice(node: yaml.Node, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Keys that a mapping repeats, with the line of the repetition, counted from 1.

    YAML forbids them; the loader keeps the last one silently. `seen` are the nodes visited
    already: an alias leads to the node that it names.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for place, (key, value) in enumerate(node.value):
            if key.value in keys[:place]:
                yield key.value, key.start_mark.line + 1
            yield from _given_twice(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _given_twice(item, seen)


def _describe(path: Path, node: yaml.Node, item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"]) or "(whole file)"
    problem = re.sub(r"^Value error, ", "", item["msg"])
    if item["type"] == "extra_forbidden":
        problem = "unknown field"
    return f"{path.name}:{_line(node, item['loc'])}: {field}: {problem}"


def _line(node: yaml.Node, loc: tuple[int | str, ...]) -> int:
    """Line of the deepest YAML node on the way to a field, counted from 1."""
    line = node.start_mark.line
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if part not in pairs:
                break
            line, node = pairs[part][0].start_mark.line, pairs[part][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1

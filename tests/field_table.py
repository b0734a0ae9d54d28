"""The table of request fields in docs/api.md, made from the models: `python -m tests.field_table` writes it anew."""

import json
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from alpaca_ray.serve.protocol import ChatCompletionRequest, CompletionRequest, DetectRequest, Only

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
MODELS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/watermark/detect": DetectRequest,
}
BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"


def tables() -> str:
    """All tables, as they stand between the two marks."""
    return "".join(f"### {path}\n\n{table(model)}\n" for path, model in MODELS.items())


def table(model: type[BaseModel]) -> str:
    """A row for each field that does something, by name; one line for those that are refused."""
    taken = {name: info for name, info in model.model_fields.items() if only(info) is None}
    refused = {name: rule for name, info in model.model_fields.items() if (rule := only(info)) is not None}
    rows = [f"| `{name}` | {text(info)} |" for name, info in sorted(taken.items())]
    lines = ["| field | |", "|---|---|", *rows]
    if refused:
        names = ", ".join(f"`{name}`{but(rule)}" for name, rule in sorted(refused.items()))
        lines += ["", f"Refused by name: {names}."]
    return "\n".join([*lines, ""])


def text(info: FieldInfo) -> str:
    """What the model says of it."""
    return (info.description or "") + ("; required" if info.is_required() else "")


def but(rule: Only) -> str:
    """The values of a refused field that pass."""
    return f" (but `{'`, `'.join(map(json.dumps, rule.neutral))}`)" if rule.neutral else ""


def only(info: FieldInfo) -> Only | None:
    """The rule of a refused field."""
    return next((item for item in info.metadata if isinstance(item, Only)), None)


def written(page: str) -> str:
    """The page with the tables as they have to be."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

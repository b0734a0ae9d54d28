"""Completions -> kept rows and rejects, in (request, position) order, whatever order the answers came in."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from alpaca_ray.config import GenerateConfig
from alpaca_ray.generate.contamination import CONTAMINATED, ContaminationFilter
from alpaca_ray.generate.filters import reject_reason
from alpaca_ray.generate.novelty import NoveltyFilter
from alpaca_ray.generate.parse import Candidate, parse_completion
from alpaca_ray.prompts import prompt_version
from alpaca_ray.schema import EvaluationTask, Reject, SeedTask


@dataclass
class Harvest:
    """What the completions so far gave. `kept` holds rows of DATASET_SCHEMA, `rejects` of REJECT_SCHEMA."""

    config: GenerateConfig
    seeds: Sequence[SeedTask]
    novelty: NoveltyFilter
    contamination: ContaminationFilter
    kept: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    @classmethod
    def start(
        cls, config: GenerateConfig, seeds: Sequence[SeedTask], evaluation: Sequence[EvaluationTask]
    ) -> "Harvest":
        """An empty one: nothing may repeat a seed task or an evaluation task."""
        novelty = NoveltyFilter((seed.instruction for seed in seeds), config.novelty_threshold)
        return cls(config, seeds, novelty, ContaminationFilter(evaluation))

    @property
    def full(self) -> bool:
        """Whether there are as many rows as asked for."""
        return len(self.kept) == self.config.num_instructions

    def counted(self) -> dict[str, int]:
        """How often each reason stands, the commonest first."""
        return dict(self.reasons.most_common())

    def add(self, request: Mapping[str, Any], completion: Mapping[str, Any]) -> None:
        """Judge every task of an answer: a row of REQUEST_SCHEMA and its row of COMPLETION_SCHEMA, with a text."""
        config = self.config
        lineage = {
            "model": completion["model"] or config.teacher.model,
            "prompt_version": prompt_version(config.prompt_style),
            "seed_tasks": request["seed_tasks"],
        }
        parsed = parse_completion(
            completion["text"], completion["finish_reason"], config.num_examples_per_prompt, config.prompt_style
        )
        rejected = [self._judge(item) for item in parsed]
        sound = [
            item for item, reject in zip(parsed, rejected, strict=True) if isinstance(item, Candidate) and not reject
        ]
        novelties = iter(self.novelty.offer_many([item.instruction for item in sound]))
        for position, (item, fault) in enumerate(zip(parsed, rejected, strict=True)):
            where = {"request": request["request"], "position": position}
            novelty = None if fault else next(novelties)
            reject = fault
            if self.full and isinstance(item, Candidate):
                reject = _row("surplus", item)
            elif novelty and not novelty.kept:
                reject = _row("duplicate", item, rouge_l=novelty.rouge_l, nearest=novelty.nearest)
            if reject:
                self.rejects.append({**where, **reject})
                self.reasons[reject["reason"]] += 1
            else:
                row_id = f"{where['request']:06d}-{position:02d}"
                self.kept.append({"id": row_id, **asdict(item), **where, **lineage})

    def _judge(self, item: Candidate | Reject) -> dict[str, Any] | None:
        """What speaks against an item but its novelty: columns of REJECT_SCHEMA; None if nothing does."""
        skip = self.config.skip_filters
        if isinstance(item, Reject):
            return asdict(item)
        if reason := reject_reason(item, skip):
            return _row(reason, item)
        if CONTAMINATED not in skip and (found := self.contamination.match(item)):
            return _row(CONTAMINATED, item, rouge_l=found.rouge_l, nearest=found.instruction)
        return None


def _row(reason: str, item: Candidate | Reject, **similar: Any) -> dict[str, Any]:
    """A rejected candidate, as one text."""
    assert isinstance(item, Candidate)
    text = f"Instruction: {item.instruction}\nInput: {item.input}\nOutput: {item.output}"
    return {"reason": reason, "text": text, **similar}

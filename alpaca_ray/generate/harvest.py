"""Completions -> kept rows and rejects, in (request, position) order, whatever order the answers came in."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from alpaca_ray.config import GenerateConfig
from alpaca_ray.generate.contamination import ContaminationFilter
from alpaca_ray.generate.filters import reject_reason
from alpaca_ray.generate.novelty import NoveltyFilter
from alpaca_ray.generate.parse import Candidate, parse_completion
from alpaca_ray.prompts import prompt_version
from alpaca_ray.schema import EvaluationTask, Reject, SeedTask


@dataclass
class Harvest:
    """What the completions so far gave. `kept` holds rows of DATASET_SCHEMA, `rejects` of REJECT_SCHEMA."""

    config: GenerateConfig
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
        return cls(config, novelty, ContaminationFilter(evaluation))

    @property
    def full(self) -> bool:
        """Whether there are as many rows as asked for."""
        return len(self.kept) == self.config.num_instructions

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
        for position, item in enumerate(parsed):
            self._judge(item, {"request": request["request"], "position": position}, lineage)

    def _judge(self, item: Candidate | Reject, where: dict[str, int], lineage: dict[str, Any]) -> None:
        if isinstance(item, Reject):
            self._reject(where, item.reason, item.text)
        elif self.full:
            self._reject(where, "surplus", _text(item))
        elif reason := reject_reason(item, self.config.skip_filters):
            self._reject(where, reason, _text(item))
        elif "contaminated" not in self.config.skip_filters and (found := self.contamination.match(item)):
            self._reject(where, "contaminated", _text(item), rouge_l=found.rouge_l, nearest=found.instruction)
        else:
            self._offer(item, where, lineage)

    def _offer(self, item: Candidate, where: dict[str, int], lineage: dict[str, Any]) -> None:
        novelty = self.novelty.offer(item.instruction)
        if novelty.kept:
            row_id = f"{where['request']:06d}-{where['position']:02d}"
            self.kept.append({"id": row_id, **asdict(item), **where, **lineage})
        else:
            self._reject(where, "duplicate", _text(item), rouge_l=novelty.rouge_l, nearest=novelty.nearest)

    def _reject(self, where: dict[str, int], reason: str, text: str, **similar: Any) -> None:
        self.rejects.append({**where, "reason": reason, "text": text, **similar})
        self.reasons[reason] += 1


def _text(candidate: Candidate) -> str:
    """A rejected candidate as one text."""
    return f"Instruction: {candidate.instruction}\nInput: {candidate.input}\nOutput: {candidate.output}"

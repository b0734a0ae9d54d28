"""What each stage starts from: name -> hash of the content. A stage that is done with the same is not done again."""

from collections.abc import Callable

from alpaca_ray.artifacts import RunDirectory, finished
from alpaca_ray.config import EvaluateConfig, GenerateConfig, RunConfig
from alpaca_ray.schema import EvaluationTask, content_hash, read_evaluation_tasks, read_seed_tasks


def of_generate(config: GenerateConfig) -> dict[str, str]:
    """Raises UserError for a file that cannot be used."""
    return {
        "seed_tasks": content_hash(read_seed_tasks(config.seed_tasks)),
        "evaluation_tasks": content_hash(read_evaluation_tasks(config.evaluation_tasks)),
    }


def of_train(run: RunDirectory) -> dict[str, str]:
    """Raises UserError if there is no finished dataset."""
    return {"dataset": finished(run, "generate")["outputs"]["dataset.parquet"]}


def of_evaluate(run: RunDirectory, config: EvaluateConfig) -> dict[str, str]:
    """Raises UserError if train is not done or the instructions cannot be used."""
    trained = finished(run, "train")
    return {"model": trained["outputs"]["model"], "instructions": content_hash(evaluated_tasks(config))}


def evaluated_tasks(config: EvaluateConfig) -> list[EvaluationTask]:
    """The instructions that both models answer."""
    return read_evaluation_tasks(config.instructions)[: config.num_instructions]


INPUTS: dict[str, Callable[[RunDirectory, RunConfig], dict[str, str]]] = {
    "generate": lambda _, config: of_generate(config.generate),
    "train": lambda run, _: of_train(run),
    "evaluate": lambda run, config: of_evaluate(run, config.evaluate),
}

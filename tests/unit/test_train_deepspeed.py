"""DeepSpeed without processes: what its configuration says, and what is refused before any work."""

import subprocess
import sys
from pathlib import Path

import pytest

from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.train.deepspeed import FILE, complete, refuse, settings


def config_for(**values: object) -> TrainConfig:
    return TrainConfig.model_validate({"base_model": "m", "strategy": "deepspeed"} | values)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_the_dtype_and_the_norm_are_the_configs(stage: int) -> None:
    ours = settings(config_for(zero_stage=stage, max_grad_norm=0.5, compute_dtype="float32"), hidden_size=64)
    assert ours["zero_optimization"]["stage"] == stage
    assert ours["gradient_clipping"] == 0.5
    assert not ours["bf16"]["enabled"]
    assert settings(config_for(compute_dtype="bfloat16"), hidden_size=64)["bf16"]["enabled"]


def test_gradients_add_up_in_fp32_and_the_loop_alone_scales_them() -> None:
    ours = settings(config_for(compute_dtype="bfloat16"), hidden_size=64)
    assert ours["communication_data_type"] == ours["data_types"]["grad_accum_dtype"] == "fp32"
    assert ours["gradient_accumulation_steps"] == 1
    assert not {"optimizer", "scheduler"} & ours.keys()


def test_only_stage_3_offloads_the_weights_that_compute() -> None:
    def offloaded(**values: object) -> set[str]:
        zero: dict[str, object] = settings(config_for(**values), 64)["zero_optimization"]
        return {name for name in zero if name.startswith("offload")}

    assert offloaded(zero_stage=3) == set()
    assert offloaded(zero_stage=2, cpu_offload=True) == {"offload_optimizer"}
    assert offloaded(zero_stage=3, cpu_offload=True) == {"offload_optimizer", "offload_param"}


def test_what_cannot_work_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(config_for(num_workers=(1, 4)))
    with pytest.raises(UserError, match=r"train\.compile .* set it to false"):
        refuse(config_for(compile=True))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(UserError, match=r"pip install 'deepspeed"):
        refuse(config_for())


@pytest.mark.parametrize("present", [[], [(0, 2)], [(1, 2)], [(0, 2), (1, 3)], [(0, 1), (0, 2), (1, 2)]])
def test_a_checkpoint_without_every_ranks_part_is_refused(tmp_path: Path, present: list[tuple[int, int]]) -> None:
    for rank, world_size in present:
        (tmp_path / FILE.format(rank, world_size)).touch()
    with pytest.raises(UserError, match="no whole checkpoint"):
        complete(tmp_path)


def test_the_parts_come_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    for rank in (10, 2, *range(2), *range(3, 10)):
        (tmp_path / FILE.format(rank, 11)).touch()
    assert [path.name for path in complete(tmp_path)] == [FILE.format(rank, 11) for rank in range(11)]


def test_nothing_but_the_strategy_itself_imports_the_library() -> None:
    code = "import sys, alpaca_ray.train.deepspeed; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

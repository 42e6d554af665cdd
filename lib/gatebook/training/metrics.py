"""What a training run writes while it runs: JSON lines, TensorBoard events, words beside a bar."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

# Dense peak of a device without sparsity, TFLOP/s in bfloat16 on tensor cores and in float32 beside
# them, by a part of its name: the makers' data sheets.
PEAK_TFLOPS = {
    "H200": {"bf16": 989.0, "fp32": 67.0},
    "H100 PCIe": {"bf16": 756.0, "fp32": 51.0},
    "H100": {"bf16": 989.0, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp32": 19.5},
    "L40S": {"bf16": 362.0, "fp32": 91.6},
    "L4": {"bf16": 121.0, "fp32": 30.3},
    "A10": {"bf16": 125.0, "fp32": 31.2},
    "V100": {"bf16": 125.0, "fp32": 15.7},  # float16; it has no bfloat16
    "RTX 4090": {"bf16": 165.0, "fp32": 82.6},
    "RTX 3090": {"bf16": 71.0, "fp32": 35.6},
}


def peak_tflops(device_name: str, precision: str = "bf16") -> float | None:
    """The peak of a device [TFLOP/s], or None for one that is not in the table.

    Args:
        device_name: As the driver gives it, or a part of it.
        precision: Of a recipe, "bf16" or "fp32".
    """
    return next(
        (peak[precision] for part, peak in PEAK_TFLOPS.items() if part in device_name), None
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one optimiser step of all processes together does.

    Attributes:
        unit: What is counted, such as tokens or images.
        per_step: Units in a step.
        flops_per_unit: Forward and backward pass of a unit, or None if it was not counted.
        peak_flops: FLOP/s of all devices together, or None if they are not known.
    """

    unit: str
    per_step: float
    flops_per_unit: float | None = None
    peak_flops: float | None = None

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """Units a second and, where both figures are known, the fraction of the peak (MFU)."""
        rate = steps_per_second * self.per_step
        found = {f"{self.unit}_per_second": rate}
        if self.flops_per_unit and self.peak_flops:
            found["mfu"] = rate * self.flops_per_unit / self.peak_flops
        return found


def logged_losses(path: str | Path) -> list[float]:
    """The losses in a log, in the order of the steps; of a step done twice the later one."""
    lines = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return [loss for _, loss in sorted({line["step"]: line["loss"] for line in lines}.items())]


class Log:
    """A log of a run; only the main process writes."""

    def __init__(
        self,
        path: str | Path | None,
        tensorboard_dir: str | Path | None,
        work: Work | None,
        *,
        main: bool,
    ) -> None:
        self.path, self.tensorboard_dir, self.work, self.main = path, tensorboard_dir, work, main
        self.wanted = path is not None or tensorboard_dir is not None or work is not None
        self.file = self.events = None
        self.last: dict[str, Any] = {}

    def __enter__(self) -> "Log":
        if self.main and self.path is not None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a", encoding="utf-8")
        if self.main and self.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(self.tensorboard_dir))
        self.start = self.before = time.perf_counter()
        self.step = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for output in (self.file, self.events):
            if output is not None:
                output.close()

    def write(self, step: int, loss: Tensor, norm: Tensor | None, lr: float) -> None:
        """One line for optimiser step `step`, counted from 0. Speed is since the line before."""
        line: dict[str, Any] = {
            "step": step,
            "loss": float(loss),  # waits for the device
            "lr": lr,
            "grad_norm": None if norm is None else float(norm),
            "seconds": round(time.perf_counter() - self.start, 4),
        }
        now, steps = time.perf_counter(), 1 if self.step is None else step - self.step
        if self.work:
            line |= self.work.rates(steps / (now - self.before))
        self.before, self.step, self.last = now, step, line
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.events:
            for name, value in line.items():
                if value is not None and name != "step":
                    self.events.add_scalar(name, value, step)

    def words(self) -> str:
        """What a progress bar says: the last loss, speed and MFU."""
        if not self.last:
            return "training"
        words = [f"loss {self.last['loss']:.3f}"]
        if self.work:
            rate = self.last[f"{self.work.unit}_per_second"]
            words.append(f"{rate:,.0f} {self.work.unit}/s")
        if "mfu" in self.last:
            words.append(f"MFU {100 * self.last['mfu']:.0f} %")
        return ", ".join(words)

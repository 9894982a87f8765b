"""SIGReg's time, memory and exactness against its equation written as it stands.

    python benchmarks/sigreg.py

Forward and backward, on a GPU if there is one. All are timed in turns in one process, in medians; on one
thread in processor time, so that a busy machine matters less. Memory is the most that PyTorch's allocator has
handed out at a time, beyond the input. Ends in one line of JSON.

On Linux the C library is told to keep the pages of freed blocks, as a GPU's allocator does. By default it
gives large ones back and faults them in anew; what needs much memory, as the equation as it stands, then
takes up to twice the time (``--fresh-pages`` shows it).
"""

# V views, N samples, K projection, M directions, T knots

import ctypes
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.losses.lejepa import SIGReg, unit_directions

NUM_DIRECTIONS, NUM_KNOTS, T_MAX = 1024, 17, 3.0
COMPLEX_EQUATION, REAL_EQUATION = "exp(itx)", "cos and sin, compiled"
EAGER, COMPILED, MATMULS = "SIGReg", "SIGReg, compiled", "two matmuls"
NAMES = (COMPLEX_EQUATION, REAL_EQUATION, EAGER, COMPILED, MATMULS)
TRAINING = (10, 64, 124)  # DALE-CT: 10 views of a batch of 64, 124 numbers each
WIDE = (10, 512, 256)
MEASURED = {
    TRAINING: NAMES,
    (10, 512, 124): (COMPLEX_EQUATION, EAGER, COMPILED, MATMULS),
    WIDE: (COMPILED, MATMULS),
    (10, 2048, 124): (COMPILED, MATMULS),
}
SECONDS_PER_PASS = 1.5  # what takes longer in all is not repeated further
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h

Equation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Cost(NamedTuple):
    """What a forward and a backward pass take."""

    seconds: float
    peak_bytes: int


def complex_equation(samples: torch.Tensor, directions: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
    """Return SIGReg of samples (V, N, K): the trapezoid sum over all knots, with complex exponentials."""
    gaussian = torch.exp(-knots.square() / 2)
    characteristic = torch.exp(1j * (samples @ directions).unsqueeze(-1) * knots).mean(-3)
    integrand = (characteristic - gaussian).abs().square() * gaussian
    return samples.shape[-2] * torch.trapezoid(integrand, knots).mean()


def real_equation(samples: torch.Tensor, directions: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
    """Return the same with cosines and sines at the positive knots: the integrand is even, and 0 at 0."""
    knots = knots[len(knots) // 2 + 1 :]
    gaussian = torch.exp(-knots.square() / 2)
    angles = (samples @ directions).unsqueeze(-1) * knots
    squared_distance = (angles.cos().mean(-3) - gaussian).square() + angles.sin().mean(-3).square()
    integrand = torch.nn.functional.pad(squared_distance * gaussian, (1, 0))
    return 2 * samples.shape[-2] * torch.trapezoid(integrand, dx=T_MAX / len(knots)).mean()


def pass_of(equation: Equation, samples: torch.Tensor) -> Callable[[], None]:
    """Return what draws directions and computes value and gradient by the equation."""

    def once() -> None:
        samples.grad = None
        directions = unit_directions(samples.shape[-1], NUM_DIRECTIONS, 7).to(samples.device)
        knots = torch.linspace(-T_MAX, T_MAX, NUM_KNOTS, device=samples.device)
        equation(samples, directions, knots).backward()

    return once


def pass_of_sigreg(sigreg: SIGReg, samples: torch.Tensor) -> Callable[[], None]:
    """Return what computes value and gradient by SIGReg."""

    def once() -> None:
        samples.grad = None
        sigreg(samples, step=7).backward()

    return once


def pass_of_matmuls(samples: torch.Tensor) -> Callable[[], None]:
    """Return the two products SIGReg needs: it projects the samples, and a gradient of projections back."""
    rows, directions = samples.detach().flatten(0, 1), unit_directions(samples.shape[-1], NUM_DIRECTIONS, 7)
    directions = directions.to(samples.device)

    def once() -> None:
        projected = directions.T @ rows.T
        _ = projected.T @ directions.T

    return once


def peak_bytes(once: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that are held at a time."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        once()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        once()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())  # stable: of one instant, in their order
    return max(itertools.accumulate(event.nbytes() for event in events))


def seconds_of(once: Callable[[], None], device: torch.device) -> float:
    """Return what one pass takes: processor time on one thread, else time on the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def costs(passes: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, Cost]:
    """Measure passes in turns; slow ones fewer times than the others."""
    peaks = {}
    for name, once in passes.items():
        if "compiled" in name:
            once()  # the compiler's memory is not the pass's
        peaks[name] = peak_bytes(once, device)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, once in passes.items():
            if sum(seconds[name]) < SECONDS_PER_PASS:
                seconds[name].append(seconds_of(once, device))
    return {name: Cost(statistics.median(seconds[name]), peaks[name]) for name in passes}


def costs_of_shape(shape: tuple[int, int, int], repeats: int, device: torch.device) -> dict[str, Cost]:
    """Measure what is of interest at one shape."""
    samples = normal(shape).to(device).requires_grad_()
    passes = {
        COMPLEX_EQUATION: pass_of(complex_equation, samples),
        REAL_EQUATION: pass_of(torch.compile(real_equation), samples),
        EAGER: pass_of_sigreg(SIGReg(NUM_DIRECTIONS, NUM_KNOTS, T_MAX, compiled=False), samples),
        COMPILED: pass_of_sigreg(compiled_sigreg(), samples),
        MATMULS: pass_of_matmuls(samples),
    }
    return costs({name: passes[name] for name in MEASURED[shape]}, repeats, device)


def errors(device: torch.device) -> tuple[float, float]:
    """Return the largest relative error of value and gradient against the equation in float64."""
    of_value, of_gradient = [], []
    for scale in (0.1, 1.0, 4.0):
        samples = (scale * normal(TRAINING)).to(device).requires_grad_()
        value = compiled_sigreg()(samples, step=3)
        (gradient,) = torch.autograd.grad(value, samples)
        exact = samples.detach().double().requires_grad_()
        directions = unit_directions(TRAINING[-1], NUM_DIRECTIONS, 3, torch.float64).to(device)
        knots = torch.linspace(-T_MAX, T_MAX, NUM_KNOTS, dtype=torch.float64, device=device)
        exact_value = complex_equation(exact, directions, knots)
        (exact_gradient,) = torch.autograd.grad(exact_value, exact)
        of_value.append(float(((value - exact_value).abs() / exact_value).detach()))
        of_gradient.append(float((gradient - exact_gradient).norm() / exact_gradient.norm()))
    return max(of_value), max(of_gradient)


def compiled_sigreg() -> SIGReg:
    """Return what is measured."""
    return SIGReg(NUM_DIRECTIONS, NUM_KNOTS, T_MAX, compiled=True)


def normal(shape: tuple[int, int, int]) -> torch.Tensor:
    """Return standard normal numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def keep_pages() -> bool:
    """Tell the C library to keep the pages of freed blocks; return whether it can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def show_costs(measured: dict[tuple[int, int, int], dict[str, Cost]], console: Console) -> None:
    """Print times and memory, each also as a multiple of SIGReg's."""
    for title, unit, of in (
        ("Forward and backward, ms", 1e3, attrgetter("seconds")),
        ("Peak memory, MiB", 2**-20, attrgetter("peak_bytes")),
    ):
        table = Table(title=f"{title} (as a multiple of compiled SIGReg)")
        table.add_column("V x N x K")
        for name in NAMES:
            table.add_column(name, justify="right")
        for shape, by_name in measured.items():
            cells = [
                f"{unit * of(by_name[name]):.3g} ({of(by_name[name]) / of(by_name[COMPILED]):.3g})"
                if name in by_name
                else "-"
                for name in NAMES
            ]
            table.add_row(" x ".join(map(str, shape)), *cells)
        console.print(table)


def main(
    repeats: int = typer.Option(9, help="Passes of which the median is taken."),
    threads: int = typer.Option(1, help="Threads of the CPU."),
    fresh_pages: bool = typer.Option(False, help="Leave the C library's allocator as it is."),
) -> None:
    """Measure SIGReg against its equation as it stands."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler says when it starts and stops
    pages = "fresh" if fresh_pages or not keep_pages() else "kept"
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {threads}"
    console = Console(width=140)
    console.print(
        f"{hardware}; torch {torch.__version__}; {NUM_DIRECTIONS} directions, {NUM_KNOTS} knots on "
        f"[-{T_MAX}, {T_MAX}]; float32; pages: {pages}",
        markup=False,
    )
    measured = {shape: costs_of_shape(shape, repeats, device) for shape in MEASURED}
    show_costs(measured, console)
    console.print(f"{COMPLEX_EQUATION} would hold 11 GiB at N = 2048 and is left out there.")
    value_error, gradient_error = errors(device)
    console.print(
        f"Largest relative error against float64: value {value_error:.1e}, gradient {gradient_error:.1e}"
    )
    ours, plain = measured[TRAINING][COMPILED], measured[TRAINING][COMPLEX_EQUATION]
    line = {
        "name": "sigreg",
        "time_ratio": plain.seconds / ours.seconds,
        "memory_ratio": plain.peak_bytes / ours.peak_bytes,
        "max_rel_error": max(value_error, gradient_error),
        "value_rel_error": value_error,
        "gradient_rel_error": gradient_error,
        "time_ratio_compiled_cos_sin": measured[TRAINING][REAL_EQUATION].seconds / ours.seconds,
        "times_its_matmuls": measured[WIDE][COMPILED].seconds / measured[WIDE][MATMULS].seconds,
        "device": hardware,
        "pages": pages,
    }
    typer.echo(json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in line.items()}))


if __name__ == "__main__":
    typer.run(main)

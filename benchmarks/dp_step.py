"""One DP-SGD step of LoRA against the same step without DP, and against Opacus' own engines, side by side.

    python benchmarks/dp_step.py [--repeats 10] [--device cpu|cuda]

Every engine takes one step in turn, again and again, so that whatever else the machine does meets all alike. Ratios are
medians of the ratios within a turn. Memory is the growth of the peak over the loaded model, each in a process of its
own. Writes benchmarks/results/dp_step.{md,json} (dp_step_cuda for a GPU).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedcollm_privacy.dp_sgd import run_private_steps
from fedcollm_privacy.independence import Independence
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.reservation import Reservation
from secure_fedcollm.losses import per_record_loss
from secure_fedcollm.tokenization import Batch

RESULTS = Path(__file__).parent / "results"
SHAPES = [(b, t) for b in (16, 32, 64) for t in (64, 128, 256)]
PEER_SHAPES = [(16, 128), (64, 128)]
OURS = ("plain, B only", "ours, B only", "plain, A and B", "ours, A and B")
PEERS = ("Opacus hooks", "Opacus functorch", "Opacus ghost")
Step = Callable[[], None]
_IMPORTED = [
    "opacus",
    "peft",
    "fedcollm_privacy.dp_sgd",
    "secure_fedcollm.losses",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
]


def model_of(family: str, both: bool, device: str) -> torch.nn.Module:
    """Random weights, true architecture, width 256, two layers; LoRA r = 8 on the attention projections."""
    torch.manual_seed(0)
    base: torch.nn.Module
    if family == "llama":
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096,
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=2,
                num_attention_heads=8,
                max_position_embeddings=512,
            )
        )
        targets, transposed = ["q_proj", "k_proj", "v_proj", "o_proj"], False
    else:
        base = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=4096,
                n_embd=256,
                n_layer=2,
                n_head=8,
                n_positions=512,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
        targets, transposed = ["c_attn"], True
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=transposed)
    model: torch.nn.Module = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name or (both and "lora_A" in name))
    return model.to(device).train()


def batch_of(records: int, length: int, device: str) -> Batch:
    ids = torch.randint(4096, (records, length), generator=torch.Generator().manual_seed(1)).to(device)
    return Batch(input_ids_BT=ids, attention_mask_BT=torch.ones_like(ids), labels_BT=ids.clone())


def plain(family: str, both: bool, batch: Batch, device: str) -> Step:
    model = model_of(family, both, device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        per_record_loss(model, batch).mean().backward()
        optimizer.step()

    return step


def ours(family: str, both: bool, batch: Batch, device: str) -> Step:
    """The shipped loop, one reserved step a call, every record sampled."""
    model, records = model_of(family, both, device), batch.input_ids_BT.shape[0]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    plan = DpPlan(
        unit="record",
        max_records_per_unit=1,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        sample_rate=Fraction(1),
        expected_batch_size=records,
        steps_per_round=1,
        rounds=1,
        delta=1e-5,
    )

    def step() -> None:
        run_private_steps(
            model=model,
            optimizer=optimizer,
            plan=plan,
            reservation=Reservation(entry="0" * 64, plan_digest=plan.digest, steps=1),
            independence=Independence(model=model),
            records_of_unit=[[i] for i in range(records)],
            record_loss=lambda chosen: per_record_loss(model, batch),
            physical_batches=lambda units: [list(range(len(units)))],
            random=SecureRandom(),
            on_step=lambda: None,
        )

    return step


def opacus(family: str, mode: str, batch: Batch, device: str) -> Step:
    """Opacus' wrapper and optimizer over both factors, with the same per-record loss."""
    records = batch.input_ids_BT.shape[0]
    inner = model_of(family, True, device)
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": records}
    if mode == "Opacus ghost":
        ghost = GradSampleModuleFastGradientClipping(
            inner, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="mean"
        )
        adam = torch.optim.Adam([p for p in ghost.parameters() if p.requires_grad], lr=1e-3)
        fast = DPOptimizerFastGradientClipping(adam, **settings)

        def ghost_step() -> None:
            fast.zero_grad()
            DPTensorFastGradientClipping(ghost, fast, per_record_loss(ghost, batch), "mean").backward()
            fast.step()

        return ghost_step
    model = GradSampleModule(inner, loss_reduction="mean", force_functorch=mode == "Opacus functorch")
    optimizer = DPOptimizer(torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3), **settings)

    def step() -> None:
        optimizer.zero_grad()
        per_record_loss(model, batch).mean().backward()
        optimizer.step()

    return step


def engine(name: str, family: str, batch: Batch, device: str) -> Step:
    if name in PEERS:
        return opacus(family, name, batch, device)
    return (plain if name.startswith("plain") else ours)(family, name.endswith("A and B"), batch, device)


def seconds(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def times(
    names: Sequence[str], family: str, shape: tuple[int, int], repeats: int, device: str
) -> dict[str, list[float]]:
    batch = batch_of(*shape, device)
    steps = {name: engine(name, family, batch, device) for name in names}
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            taken[name].append(seconds(steps[name], device))
    return taken


def _peak(name: str, family: str, shape: tuple[int, int], device: str, answer: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    step = engine(name, family, batch_of(*shape, device), device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        step()
        answer.put((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    # A small step first, so that libraries and code are loaded before the peak is taken.
    engine(name, family, batch_of(1, 8, device), device)()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step()
    step()
    answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)


def peak_mib(name: str, family: str, shape: tuple[int, int], device: str) -> float:
    """Median of three processes for small batches, where what the allocator keeps differs by a tenth between them."""
    # On a CPU, forked from a process that has done the imports. CUDA does not survive a fork.
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    context.set_forkserver_preload(_IMPORTED)
    peaks = []
    for _ in range(3 if shape[0] * shape[1] <= 4096 else 1):
        answer: Any = context.Queue()
        process = context.Process(target=_peak, args=(name, family, shape, device, answer))
        process.start()
        peaks.append(float(answer.get(timeout=600)))
        process.join()
    return statistics.median(peaks)


def reference(name: str) -> str:
    return "plain, B only" if name == "ours, B only" else "plain, A and B"


def rows_of(family: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        names = OURS + (PEERS if shape in PEER_SHAPES else ())
        taken = times(names, family, shape, arguments.repeats, arguments.device)
        peaks = {name: peak_mib(name, family, shape, arguments.device) for name in names}
        for name in names:
            against = reference(name)
            rows.append(
                {
                    "model": family,
                    "batch": shape[0],
                    "length": shape[1],
                    "engine": name,
                    "ms": 1000 * statistics.median(taken[name]),
                    "ratio": statistics.median(a / b for a, b in zip(taken[name], taken[against], strict=True)),
                    "peak_mib": peaks[name],
                    "peak_ratio": peaks[name] / peaks[against],
                }
            )
        sys.stderr.write(f"{family} {shape} done\n")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: time and peak memory, each as a multiple of the plain step's."""
    engines = [name for name in (*OURS, *PEERS) if name.startswith("ours") or name in PEERS]
    lines = ["| model | batch x length | " + " | ".join(f"{e}: time, peak" for e in engines) + " | plain A and B, ms |"]
    lines.append("|---" * (len(engines) + 3) + "|")
    for family in ("llama", "gpt2"):
        for b, t in SHAPES:
            found = {r["engine"]: r for r in rows if (r["model"], r["batch"], r["length"]) == (family, b, t)}
            if not found:
                continue
            cells = [f"{found[e]['ratio']:.3f}, {found[e]['peak_ratio']:.2f}" if e in found else "" for e in engines]
            lines.append(f"| {family} | {b} x {t} | {' | '.join(cells)} | {found['plain, A and B']['ms']:.0f} |")
    for e in engines:
        ratios = sorted(r["ratio"] for r in rows if r["engine"] == e)
        if ratios:
            lines.append("")
            middle = statistics.median(ratios)
            lines.append(f"{e}: median over shapes {middle:.3f} of the plain step, worst {ratios[-1]:.3f}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--families", nargs="+", default=["llama", "gpt2"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [row for family in arguments.families for row in rows_of(family, arguments)]
    if not all(math.isfinite(row["ratio"]) for row in rows):
        raise SystemExit("a measurement is missing")
    RESULTS.mkdir(exist_ok=True)
    name = "dp_step" if arguments.device == "cpu" else "dp_step_cuda"
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    device = "one CPU thread" if arguments.device == "cpu" else torch.cuda.get_device_name()
    text = (
        f"# One DP-SGD step as a multiple of the same step without DP ({device})\n\n"
        f"torch {torch.__version__}, medians of {arguments.repeats} turns; width 256, two layers, LoRA r = 8 on "
        "attention.\n\n" + table(rows)
    )
    (RESULTS / f"{name}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

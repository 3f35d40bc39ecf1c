"""pinfer generate (also `main`): continue a prompt, streaming the text."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from pinfer.cli import options
from pinfer.cli.console import emit_json, note, read_prompt
from pinfer.cli.converse import Talk, Task, converse, report, stream
from pinfer.cli.run_report import layer_figures, report_run
from pinfer.config import Activation, Backend, DeviceName, Method, Numa, Precision, RunConfig, SamplingConfig
from pinfer.engine import Engine, Generation, load_engine
from pinfer.engine.run_stats import RunStatistics

Number = Annotated[int, typer.Option("-n", "--n-predict", help="Tokens to generate; -1: until the end of text.")]
Context = Annotated[int | None, typer.Option("-c", "--ctx-size", help="Positions of context; 0: the model's limit.")]
PredictorPath = Annotated[
    str | None, typer.Option("--predictor-path", help="Directory of pinfer solve or train, whose predictors are used.")
]
GpuLayers = Annotated[
    int | None,
    typer.Option(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        "--target-gpu-layers",
        help="So many of the last layers wholly on the GPU; above their number, or -1, the head too.",
    ),
]
GpuMemory = Annotated[
    float | None,
    typer.Option("--gpu-memory-gb", "--vram-budget", help="GPU memory to place by, and the most to take, GB."),
]
DeviceOption = Annotated[
    DeviceName,
    typer.Option("--device", help="auto: a CUDA GPU if there is one; emulated: the GPU's part as a second CPU shard."),
]
PlanFile = Annotated[
    str | None,
    typer.Option("--plan", help="Placement to run, from pinfer plan -o; that of --predictor-path if left out."),
]
Threads = Annotated[
    int | None,
    typer.Option("-t", "--threads", help="CPU threads; if left out the physical cores, or 1 for models below 32 MB."),
]
Temperature = Annotated[float, typer.Option("--temp", help="Temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus mass; 1 is off.")]
TopK = Annotated[int, typer.Option("--top-k", help="Best k tokens; 0 is off.")]
MinP = Annotated[float, typer.Option("--min-p", help="Least share of the best token's probability; 0 is off.")]
Penalty = Annotated[float, typer.Option("--repeat-penalty", help="Penalty on repeated tokens; 1 is off.")]
PenaltyWindow = Annotated[int, typer.Option("--repeat-last-n", help="Tokens the penalty looks back on.")]
Seed = Annotated[int | None, typer.Option("-s", "--seed", help="Seed of the draws; random if left out.")]
Stop = Annotated[list[str] | None, typer.Option("-r", "--stop", "--reverse-prompt", help="Stop at this text.")]
Interactive = Annotated[bool, typer.Option("-i", "--interactive", help="Read prompts line by line.")]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Messages of a chat, by its template; -i does so if the model has one."),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option("--chat-template", help="Jinja file, or a family's name such as chatml, for the model's own."),
]
System = Annotated[str | None, typer.Option("--system", help="A chat's system message.")]
NumaOption = Annotated[
    Numa, typer.Option("--numa", help="Pin threads, and take memory, over all nodes or on this one alone.")
]
MethodOption = Annotated[Method, typer.Option("--method", help="Which neurons to compute.")]
Sparsity = Annotated[
    float | None, typer.Option("--sparsity", help="Share of neurons (or inputs) to skip, such as 0.5.")
]
PredictorRank = Annotated[int, typer.Option("--predictor-rank", help="Rank of low_rank, a multiple of 32.")]
Record = Annotated[bool, typer.Option("--record/--no-record", help="Repeat decode steps from a recording.")]
Recall = Annotated[float, typer.Option("--recall", help="Share of active neurons that low_rank is to catch.")]
ColdFraction = Annotated[float, typer.Option("--cold-fraction", help="Share of neurons on a second shard.")]
ActivationOption = Annotated[
    Activation | None,
    typer.Option("--activation", help="Override the file's activation; drelu is ReLU on both gate and up."),
]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Activations in quantised products.")]
Stats = Annotated[bool, typer.Option("--stats", help="Say, layer by layer, what the placement came to in this run.")]
SaveStats = Annotated[
    str | None, typer.Option("--save-stats", help="Write what was gathered there, for pinfer plan --from-run.")
]
BackendOption = Annotated[Backend, typer.Option("--backend", help="Where kernels run.")]


def generate(
    model: options.Model = None,
    prompt: options.Prompt = None,
    file: options.PromptFile = None,
    n_predict: Number = 128,
    ctx_size: Context = None,
    predictor_path: PredictorPath = None,
    gpu_layers: GpuLayers = None,
    gpu_memory_gb: GpuMemory = None,
    plan: PlanFile = None,
    device: DeviceOption = "auto",
    threads: Threads = None,
    numa: NumaOption = "none",
    temp: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 40,
    min_p: MinP = 0.05,
    repeat_penalty: Penalty = 1.0,
    repeat_last_n: PenaltyWindow = 64,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of text.")] = False,
    special: options.Special = False,
    interactive: Interactive = False,
    chat: Chat = None,
    chat_template: ChatTemplate = None,
    system: System = None,
    color: Annotated[bool, typer.Option("--color", help="Set the prompt apart, on a terminal.")] = False,
    display_prompt: Annotated[bool, typer.Option("--display-prompt/--no-display-prompt", help="Echo it.")] = True,
    method: MethodOption = "auto",
    sparsity: Sparsity = None,
    predictor_rank: PredictorRank = 128,
    recall: Recall = 0.99,
    record: Record = True,
    cold_fraction: ColdFraction = 0.0,
    activation: ActivationOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    stats: Stats = False,
    save_stats: SaveStats = None,
    json: options.Json = False,
) -> None:
    """Continue a prompt."""
    sampling = SamplingConfig(
        temperature=temp,
        top_k=max(0, top_k),  # llama.cpp: 0 and below are off
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        repeat_last_n=2**31 - 1 if repeat_last_n == -1 else repeat_last_n,  # llama.cpp: the whole context
        seed=None if seed == -1 else seed,  # llama.cpp: random
    )
    run = RunConfig(
        model=model,
        context=ctx_size,
        activation=activation,
        threads=threads,
        backend=backend,
        precision=precision,
        method=method,
        sparsity=sparsity,
        cold_fraction=cold_fraction,
        sampling=sampling,
        predictor_rank=predictor_rank,
        recall=recall,
        record=record,
        numa=numa,
        predictor_path=predictor_path,
        device="cpu" if cold_fraction and device == "auto" else device,
        plan=plan,
        gpu_layers=gpu_layers,
        gpu_memory_gb=gpu_memory_gb,
    )
    if n_predict < -1:
        raise ValueError(f"-n must be -1 (until the end of text) or at least 0, not {n_predict}")
    talk = Talk.chosen(chat, chat_template, system, special)
    if interactive and json:
        raise ValueError("--json has no meaning with -i")
    text = None if interactive and prompt is None and file is None else read_prompt(prompt, file)
    if text is not None and prompt is None:
        text = text.removesuffix("\n")  # an editor's last newline is not meant, as in llama.cpp
    if text is None and not interactive:
        raise ValueError("no prompt: give -p TEXT, -f FILE, or -i to type one")
    engine = load_engine(run, note)
    for remark in engine.notes:
        note(remark)
    statistics = RunStatistics(engine, masses=save_stats is not None) if stats or save_stats is not None else None
    task = Task(engine, None if n_predict == -1 else n_predict, stop or [], ignore_eos, special, statistics)
    speaker = talk.speaker(task, interactive)
    if interactive:
        converse(speaker, text, color)
        _report_statistics(statistics, save_stats, not stats)
        return
    generation = speaker.reply(text or "")
    if json:
        for _ in generation:
            pass
        _report_statistics(statistics, save_stats, quiet=True)
        emit_json(_figures(engine, generation) | ({"layers": layer_figures(statistics.layers())} if statistics else {}))
        return
    stream(generation, text if display_prompt and speaker.continues else None, color)
    report(generation)
    _report_statistics(statistics, save_stats, not stats)


def _report_statistics(statistics: RunStatistics | None, save: str | None, quiet: bool) -> None:
    if statistics is not None:
        report_run(statistics, save, quiet)


def _figures(engine: Engine, generation: Generation) -> dict[str, Any]:
    stats = generation.stats
    return {
        "text": generation.text,
        "ids": generation.ids,
        "finish_reason": cast(str, generation.finish_reason),
        "method": engine.method,
        "seed": generation.seed,
        "prompt_tokens": stats.prompt_tokens,
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "decoded_tokens": stats.decoded_tokens,
        "tokens_per_s": stats.tokens_per_s,
        "density": stats.density,
        "recorded": stats.unrecorded is None,
        "peak_rss_bytes": stats.peak_rss_bytes,
        "vram_bytes": stats.vram_bytes,
        "placement": placement_figures(engine),
    }


def placement_figures(engine: Engine) -> dict[str, Any] | None:
    """What is where, for --json; None where all is on the CPU."""
    found = engine.placement
    if found is None:
        return None
    return {
        "device": found.device.name,
        "source": found.source,
        "gpu_layers": found.n_layers,
        "hot_share": found.hot_share,
        "head": found.plan.head,
        "budget_bytes": found.device.budget,
        "estimated_bytes": found.estimate.gpu_bytes,
        "placed_bytes": found.device.account.peak,
    }

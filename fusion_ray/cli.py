"""`fusion-ray ...`: the command line (design.md section 7). Parses before any heavy import; exit codes 0 done, 1 failed, 2 bad usage or config."""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from fusion_ray.config import ConfigError, FusionConfig, load_config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fuse chat models of different architectures and tokenizers into one model of the pivot's size.",
)
INTERRUPTED = 130
console = Console()
errors = Console(stderr=True)

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="the run's YAML, for example jobs/configs/demo.yaml")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="values laid over the YAML")]
Artefact = Annotated[
    str, typer.Argument(metavar="ARTEFACT", help="its folder or URL: <storage>/artifacts/<stage>/<key>")
]
OfModel = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="PATH", help="the folder of the rows' model [default: looked for in the storage's runs]"
    ),
]
Branch = Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="only this branch (repeatable)")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors become one clear message, a traceback only with --debug.

    Without `argv` it is the program itself, and may end the process.
    """
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if argv is None and not {"ray", "torch"} & set(sys.modules):  # nobody has anything to do at the end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking the interpreter apart takes 0.2 s
    return code


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    collects = gc.isenabled()
    try:
        code = app(arguments, standalone_mode=False, prog_name="fusion-ray")
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return _explain(error)
    finally:
        if collects:
            gc.enable()
    if code == INTERRUPTED:  # typer's own number for Ctrl-C
        errors.print("interrupted: what was sealed is kept; the same command goes on from there")
        return _leave(INTERRUPTED)
    return int(code or 0)


def _explain(error: Exception) -> int:
    usage = getattr(error, "format_message", None)  # click's own usage errors
    if usage is not None:
        errors.print(f"[red]error:[/red] {usage()}\nsee fusion-ray --help", highlight=False)
        return 2
    cause = _root_cause(error)
    errors.print("[red]error:[/red]", end=" ")
    errors.print(str(cause).strip() or type(cause).__name__, markup=False, highlight=False, soft_wrap=True)
    expected = isinstance(cause, ValueError | OSError) or type(cause).__module__.startswith("fusion_ray.")
    if not expected:
        errors.print(f"({type(cause).__name__}; repeat with --debug for the traceback)", highlight=False)
    return 2 if isinstance(cause, ConfigError) else 1


def _root_cause(error: BaseException) -> BaseException:
    """What a remote task or worker really raised: Ray wraps it, and the wrapper's text is a page of remote traceback."""
    while True:
        inner = getattr(error, "cause", None) or getattr(error, "base_exc", None)
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _leave(code: int) -> int:
    """Flush and end at once: threads of a cut-off run wait for Ray and would hold the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
        os._exit(code)
    return code


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """--debug is taken out before parsing, so that it may stand anywhere; it is declared here for --help."""


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """The whole graph, from corpus to report. Safe to repeat: what is sealed is not done again."""
    settings = load_config(config, overrides or [])
    _work(settings, select=None)


def _stage_command(stage: str, text: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None, only: Branch = None) -> None:
        settings = load_config(config, overrides or [])
        _work(settings, select=stage, only=only)

    command.__doc__ = text
    return command


app.command("teach")(_stage_command("teach", "Teachers read the corpus: top-k logprobs of every model."))
app.command("distill")(_stage_command("distill", "Fine-tune one target for each source (and what that needs)."))
app.command("merge-targets")(_stage_command("merge", "Merge the targets (and what that needs)."))
app.command("evaluate")(_stage_command("evaluate", "Serve and score every model (and what that needs)."))


@app.command("align")
def align_command(
    config: ConfigPath,
    overrides: Overrides = None,
    only: Branch = None,
    explain: Annotated[
        str | None, typer.Option(metavar="ROW", help="show this row (an id) in both tokenizations")
    ] = None,
) -> None:
    """Align every source's logprobs to the pivot's vocabulary (and what that needs)."""
    settings = load_config(config, overrides or [])
    _work(settings, select="align", only=only)
    if explain is not None:
        from fusion_ray.views import explain_row

        for name in only or [source.name for source in settings.sources]:
            console.print(explain_row(settings, name, explain), highlight=False, soft_wrap=True)


@app.command("merge")
def merge_command(
    merge_file: Annotated[
        Path,
        typer.Argument(
            metavar="MERGE.yml",
            help="a merge file in mergekit's dialect, for example jobs/configs/merge/fusechat_sce.yml",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder that becomes the merged model")],
    max_bytes_in_flight: Annotated[str, typer.Option(help="what is read of the models at a time")] = "1GB",
    max_shard_size: Annotated[str, typer.Option(help="of the output's files")] = "5GB",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="tensors that are merged side by side [default: the cores of this process]"),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="what computes: a CUDA device where there is one, or this; the bytes are the same"),
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="afterwards, ask the merged model for its next token of a prompt")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="replace another merge of this program in OUT")] = False,
) -> None:
    """Merge models of one architecture on this machine, without Ray. Safe to repeat: whole shards are not made again."""
    gc.disable()  # a tenth of a second of the start; a merge makes no cycles
    from fusion_ray.merge_command import describe, read_bytes
    from fusion_ray.merge_command import merge_file as merge
    from fusion_ray.progress import tensors_of

    with tensors_of(console) as report:
        merged = merge(
            merge_file,
            out,
            max_bytes_in_flight=read_bytes(max_bytes_in_flight),
            max_shard_bytes=read_bytes(max_shard_size),
            threads=workers,
            overwrite=overwrite,
            report=report,
            device=device,
        )
    console.print(describe(merged, out), highlight=False, markup=False, soft_wrap=True)
    if check:
        gc.enable()
        from fusion_ray.workers.merge_check import check_model

        console.print(check_model(str(out)), highlight=False, markup=False, soft_wrap=True)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Does no work: the graph's nodes, what is cached, sizes, memory peaks and problems found."""
    from fusion_ray.plan import plan_table

    settings = load_config(config, overrides or [])
    text, problems = plan_table(settings)
    console.print(text)
    for problem in problems:
        errors.print(f"[yellow]problem:[/yellow] {problem}", highlight=False)
    if problems:
        raise typer.Exit(1)


@app.command()
def report(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="a run's name or its folder")],
    storage: Annotated[str, typer.Option(help="where runs are stored")] = "runs",
) -> None:
    """Show a finished run's table again and rewrite its report.html from its artefacts."""
    from fusion_ray.summary import rewrite_report

    console.print(rewrite_report(storage, run_name))


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(metavar="CONFIG|MODEL", help="a run's YAML (serves its fused model) or a model folder")
    ],
    overrides: Overrides = None,
    insecure: Annotated[bool, typer.Option(help="no key asked; binds to loopback only")] = False,
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint until interrupted."""
    from fusion_ray.views import serve_model

    serve_model(model, overrides or [], insecure=insecure, say=lambda text: console.print(text, highlight=False))


@app.command("inspect")
def inspect_command(
    artefact: Artefact,
    row: Annotated[str | None, typer.Option("--row", metavar="ID", help="the row to show [default: the first]")] = None,
    positions: Annotated[int, typer.Option(min=1, help="predicting positions that are shown")] = 24,
    model: OfModel = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, with all of the top-k")] = False,
) -> None:
    """What an artefact holds, and one row of it: tokens, top-k with probabilities, tail mass."""
    from fusion_ray import inspect_artifact

    view = inspect_artifact.look(artefact, row=row, positions=positions, model=model)
    if as_json:
        print(inspect_artifact.as_json(view))
    else:
        inspect_artifact.show(view, console)


@app.command("export")
def export_command(
    artefact: Artefact,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="a new folder (distillkit) or a new file of lines (jsonl)")
    ],
    to: Annotated[Literal["distillkit", "jsonl"], typer.Option("--format", help="see above")] = "distillkit",
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="of DistillKit's logprobs; both hold the artefact's exactly")
    ] = "float32",
    model: OfModel = None,
) -> None:
    """Rows of a teach or align artefact for another program.

    distillkit: shard-NNNNN.parquet with input_ids (uint64), compressed_logprobs (bytes of the K logprobs of the next token at every token but the
    last), bytepacked_indices (their ids, ceil(log2 V) bits each) and labels (-100 but at the tokens that are predicted), and compression_config.yaml,
    which says V, K and that all K are exact. Where the artefact says nothing the next token has probability 1. `_fusion_ray/` holds what the layout
    has no place for (ids, byte spans, label logprobs), so that `fusion-ray import` gives back the same rows.

    jsonl: a line a row, every column under its own name, top-k as K values a position, logprobs as natural logarithms. For looking.
    """
    from fusion_ray.exchange import export_rows

    console.print(
        export_rows(artefact, out, form=to, dtype=dtype, model=model), highlight=False, markup=False, soft_wrap=True
    )


@app.command("import")
def import_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="DistillKit's Parquet files beside their compression_config.yaml")
    ],
    config: ConfigPath,
    overrides: Overrides = None,
    teacher: Annotated[
        str, typer.Option(metavar="NAME", help="the pivot or source of CONFIG whose logprobs these are")
    ] = "",
) -> None:
    """Take logprobs in DistillKit's layout as what a model of CONFIG taught, in place of its teach stage.

    Rows that `fusion-ray export` wrote come back whole. Files of DistillKit itself are matched by their tokens with the conversations of CONFIG's corpus
    as the model's chat template renders them, which gives the byte spans; the logprob of a label outside the top K is not in them, and the largest
    value that it can have is taken and counted.
    """
    from fusion_ray.exchange import import_rows

    settings = load_config(config, overrides or [])
    console.print(import_rows(folder, settings, teacher), highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """What of the environment works: interpreter, engines, memory, disk."""
    from fusion_ray.doctor import examine

    healthy = True
    for check in examine():
        healthy &= check.ok
        mark = "[green]ok  [/green]" if check.ok else "[red]FAIL[/red]"
        console.print(f"{mark} {check.name:<12} {check.detail}", highlight=False)
    if not healthy:
        raise typer.Exit(1)


def _work(settings: FusionConfig, select: str | None, only: Sequence[str] | None = None) -> None:
    """Make the nodes of one stage (or of all) and, after a whole run, write and show its report."""
    from fusion_ray.graph import build_graph
    from fusion_ray.plan import check
    from fusion_ray.progress import listener_for

    graph = build_graph(settings)
    nodes = [node for node in graph if select in (None, node.stage) and (not only or node.branch in only)]
    if not nodes:
        branches = sorted({node.branch for node in graph if node.stage == select})
        raise ConfigError(
            f"--only {', '.join(only or [])}: the stage {select} has the branches {', '.join(branches) or 'none'}"
        )
    if not all(node.artifact.sealed for node in nodes):
        check(settings, graph)
    from fusion_ray.pipeline import run_graph  # Ray and torch: seconds, after all that can be refused was

    console.print(
        f"run {settings.run.name}: {sum(node.artifact.sealed for node in nodes)} of {len(nodes)} nodes are done",
        highlight=False,
    )
    with listener_for(console) as listener:
        runs = run_graph(settings, graph, nodes, listener)
    if select is None:
        from fusion_ray.summary import write_report

        console.print(write_report(settings, graph, runs))


if __name__ == "__main__":
    raise SystemExit(main())

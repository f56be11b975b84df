"""Tasks and samples during training: what `train` evaluates at some steps besides its validation loss.

At such a step the checkpoint, if one is due, is saved first, so that a process that ends during a long evaluation loses
nothing else: a run that continues from a step whose lines are missing writes them first. The programs are those of
`LanguageModel`, compiled once per run; their memory is taken beside that of the training state, and not part of the
plan that `train` prints. Samples need the parameters split along tensor alone.
"""

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.token_store import TokenStore
from trialgpt_jax.evaluation.task import random_state_kept
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.live_line import task
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.parallel import processes
from trialgpt_jax.training.metric_lines import has_tasks
from trialgpt_jax.training.metrics import read_metrics, read_samples
from trialgpt_jax.training.program import Program
from trialgpt_jax.training.reporter import Reporter
from trialgpt_jax.training.stop import StopRequest

_TASKS, _SAMPLES = "tasks", "samples"
_SAMPLING = Sampling(temperature=0.8)


class InLoop:
    """The evaluations of a run.

    Args:
      config: the resolved config, see its group `eval`.
      workdir: of the run.
      resumed: the checkpoint that the run continues from; None = it begins at step 0.

    Raises:
      UserError: the workdir's lines up to that step are damaged.
    """

    def __init__(self, config: ConfigDict, workdir: str, resumed: int | None):
        self._config, self._resumed, self._written = config, resumed, []
        self._every = {}  # kind -> steps
        if config.eval.tasks:
            self._every[_TASKS] = config.eval.tasks_every_steps
        if config.eval.sample_prompts:
            self._every[_SAMPLES] = config.eval.sample_every_steps
        if self._every and resumed:
            self._written = processes.from_first(lambda: _written(workdir, resumed, config.eval.sample_prompts))
        self._tasks, self._names, self._model = [], [], None

    def due(self, step: int) -> list[str]:
        """What is due at `step` and not written yet; every process gets the same answer."""
        last = step == self._config.train.steps
        kinds = [kind for kind, every in self._every.items() if last or (every and step % every == 0)]
        return [kind for kind in kinds if step != self._resumed or kind not in self._written]

    def prepare(self, program: Program, store: TokenStore) -> str:
        """Reads and checks the data of the tasks and the prompts; nothing is compiled.

        Args:
          program: the run's.
          store: its token store.

        Returns:
          What will be evaluated, for the log; "" = nothing.

        Raises:
          UserError: a task that does not exist, its data, or a prompt that the model cannot continue.
        """
        group, lines = self._config.eval, []
        for kind, every in self._every.items():
            what = f"tasks {', '.join(self._load())}" if kind == _TASKS else f"{len(group.sample_prompts)} sample(s)"
            lines.append(f"{what}: " + (f"every {every:,} steps" if every else "after the last step"))
        for name, of, wanted in (("tasks", "tasks", group.tasks), ("sample", "sample_prompts", group.sample_prompts)):
            if group[f"{name}_every_steps"] and not wanted:
                lines.append(f"warning: eval.{name}_every_steps has no effect, because eval.{of} is empty")
        if self._every:
            tokenizer = tokenizer_lib.from_store(store.folder)
            self._check_prompts(tokenizer)
            self._model = LanguageModel(None, program.gpt, tokenizer, program.mesh)
        return "\n".join(lines)

    def _load(self) -> list[str]:
        """Reads the tasks, in process 0; returns their names."""
        from trialgpt_jax.evaluation import suite  # late: most runs need none of it

        group = self._config.eval
        with random_state_kept(), task("loading the tasks"):
            self._tasks = suite.load(
                suite.parse(group.tasks, "eval.tasks"),
                task_data=suite.parse_task_data(group.task_data, "eval.task_data"),
                include_path=group.include_path,
                core_bundle=group.core_bundle,
                prefix="eval.",
            )
        self._names = processes.from_first(lambda: [each.name for each in self._tasks])
        return self._names

    def _check_prompts(self, tokenizer) -> None:
        """Refuses prompts that the tokenizer cannot encode, or that leave no room for their continuation."""
        room = self._config.model.block_size - self._config.eval.sample_tokens
        for prompt in self._config.eval.sample_prompts:
            try:
                n = len(tokenizer.encode(prompt))
            except UserError as error:
                raise UserError(f"eval.sample_prompts: {prompt!r:.100}: {error}") from None
            if not n:
                raise UserError(f"eval.sample_prompts: the tokenizer makes no tokens of {prompt!r:.100}")
            if n > room:
                raise UserError(
                    f"eval.sample_prompts: {prompt!r:.100} has {n} tokens, but model.block_size="
                    f"{self._config.model.block_size} leaves {room} besides eval.sample_tokens="
                    f"{self._config.eval.sample_tokens}"
                )

    def run(self, step: int, params, reporter: Reporter, stop: StopRequest) -> bool:
        """Evaluates what is due at `step`, and writes its lines; every process calls it.

        Args:
          step: that is complete.
          params: the parameters after it, on the run's mesh.
          reporter: the run's.
          stop: the run's, looked at before each task; with one process also after each batch.

        Returns:
          False if it ended before everything was written, because a stop was asked for.
        """
        kinds = self.due(step)
        if not kinds:
            return True
        model = self._model

        def end_if_asked() -> None:
            if stop.asked():
                raise _Stopped

        model.params, model.step = params, step
        model.on_batch = end_if_asked if jax.process_count() == 1 else lambda: None  # others would wait
        try:
            with random_state_kept():
                run = {_SAMPLES: self._run_samples, _TASKS: self._run_tasks}
                return all(run[kind](step, reporter, stop) for kind in kinds)
        except _Stopped:
            return False
        finally:
            model.params = None  # the next step takes their memory

    def _run_samples(self, step: int, reporter: Reporter, stop: StopRequest) -> bool:
        if processes.from_first(stop.asked):
            return False
        prompts, options = list(self._config.eval.sample_prompts), {"max_new_tokens": self._config.eval.sample_tokens}
        options |= {"sampling": _SAMPLING, "seed": self._config.seed}
        texts = self._model.drive(lambda: self._model.generate(prompts, **options)) or []
        reporter.samples(step, list(zip(prompts, texts, strict=False)))  # no texts in processes other than 0
        return True

    def _run_tasks(self, step: int, reporter: Reporter, stop: StopRequest) -> bool:
        results, model = {}, self._model
        for i, name in enumerate(self._names):
            if processes.from_first(stop.asked):
                return False
            say(f"step {step}: evaluating {name}")
            results |= model.drive(lambda i=i: self._tasks[i].run(model)) or {}
        reporter.tasks(step, {name: result.metrics for name, result in results.items()})
        return True


class _Stopped(Exception):
    """Raised after a batch, when a stop was asked for."""


def _written(workdir: str, step: int, prompts: tuple[str, ...]) -> list[str]:
    """What the workdir has of `step`."""
    tasks = any(line["step"] == step and has_tasks(line) for line in read_metrics(workdir, step))
    samples = any(line["step"] == step for line in read_samples(workdir, step, prompts))
    return [kind for kind, found in ((_TASKS, tasks), (_SAMPLES, samples)) if found]

"""What moves the weights: schedules (functions of the step, without a state), optimizers, and a moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lmscripts.errors import UserError
from lmscripts.training.sharding import part_like

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.training.state import TrainingState

ScheduleName = Literal["linear", "cosine", "constant", "wsd"]
OptimizerName = Literal["adamw", "adam", "radam", "sgd", "lamb", "muon"]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class Schedule:
    """Learning rate of an optimizer step, as a function of its number, counted from 0: `rate(step)`.

    It rises linearly over `warmup_steps` (the first step already moves), then follows the schedule and would reach
    final_ratio x peak at `max_steps`, the step after the last.

    Attributes:
        schedule: "linear" and "cosine" decay from the end of the warmup; "constant" does not decay; "wsd"
            (warmup-stable-decay, arXiv:2404.06395, section 4) stays and decays linearly over the last `decay_steps`.
        peak: the highest learning rate.
        warmup_steps: steps of the warmup.
        max_steps: length of the schedule.
        decay_steps: for "wsd".
        final_ratio: where the decay ends, as a share of the peak.

    Raises:
        UserError: the steps of warmup and decay are more than there are.
    """

    schedule: ScheduleName
    peak: float
    warmup_steps: int
    max_steps: int
    decay_steps: int | None = None
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule == "wsd" and self.warmup_steps + (self.decay_steps or 0) > self.max_steps:
            raise UserError(
                f"warmup {self.warmup_steps} and decay {self.decay_steps} are more than the {self.max_steps} steps of "
                "the run"
            )

    def __call__(self, step: int) -> float:
        """The rate of a step in [0, max_steps)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        begin = self.max_steps - (self.decay_steps or 0) if self.schedule == "wsd" else self.warmup_steps
        done = max(0.0, (step - begin) / max(1, self.max_steps - begin))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.peak * (self.final_ratio + (1 - self.final_ratio) * left)


def rates_text(
    rate: Callable[[int], float], num_steps: int, corners: Sequence[int] = (), others: Sequence[int] = ()
) -> str:
    """The rates of some steps in words: the first, the middle, the last, corners of the schedule and others."""
    last = num_steps - 1
    marks = sorted({min(mark, last) for mark in (0, *corners, last // 2, last, *others)})
    rates = ", ".join(f"step {step + 1:,} {rate(step):.2e}" for step in marks)
    if corners and max(corners) > last:
        rates += f"; the warmup of {max(corners):,} steps is longer than the run"
    return rates


def clip_gradients(accelerator: Accelerator, model: nn.Module, most: float) -> Tensor:
    """Scale gradients to a global norm of at most so much; () the norm before, the same on all processes."""
    if accelerator.scaler is not None:
        accelerator.unscale_gradients()
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]


def step(
    optimizer: torch.optim.Optimizer, norm: Tensor, state: TrainingState, *, has_scaler: bool, at_once: bool = False
) -> bool:
    """Move the weights, on all processes or on none: not where the global norm of the gradients is no finite number.

    A GPU is not waited for where the optimizer can look at the norm there by itself: what became of the step is learned
    after the next one, and taken to be well until then.

    Args:
        optimizer: of the run; its gradients are gone afterwards.
        norm: () the global norm, the same on all processes.
        state: counts what was skipped, see its `judge`.
        has_scaler: of fp16, which has to see gradients that are not finite too, to find its scale.
        at_once: what became of it has to be known now.

    Returns:
        Whether the weights have moved.

    Raises:
        UserError: too many steps in a row had no finite gradient.
    """
    late = not (at_once or has_scaler) and _is_told_later(optimizer, norm)
    if late:
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    is_finite = state.judge(norm, has_scaler, late)
    if is_finite or has_scaler:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return is_finite


def _is_told_later(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    """On a CPU there is nothing to wait for."""
    can_look = getattr(optimizer, "_step_supports_amp_scaling", False) or isinstance(optimizer, _TwoOptimizers)
    return norm.device.type != "cpu" and can_look


def with_scaler(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer under the loss scaler of fp16; without one as it is, as what is around it costs time."""
    return accelerator.prepare(optimizer) if accelerator.scaler is not None else optimizer  # type: ignore[no-any-return]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def parameter_groups(
    model: nn.Module, weight_decay: float, leave_out: Iterable[nn.Parameter] = ()
) -> list[dict[str, object]]:
    """Two groups: matrices (embeddings included) decay, vectors (biases, norms) do not; frozen parameters are in none.

    Args:
        model: a parameter that several of its modules share is counted once.
        weight_decay: of the matrices.
        leave_out: parameters that belong to no group.
    """
    left_out = set(leave_out)
    parameters = [p for p in model.parameters() if p.requires_grad and p not in left_out]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """An optimizer over the parameters that are not frozen, with weight decay on matrices only.

    - "adamw" (arXiv:1711.05101): each step takes learning rate x decay x weight off the weight, beside Adam's update.
      BERT's own optimizer is this one without the correction of the moments' bias.
    - "adam" (arXiv:1412.6980): the decay is a penalty instead: decay x weight is added to the gradient before the
      moments are taken, so that Adam rescales it as it rescales the gradient. With decay 0 it is adamw with decay 0.
    - "radam" (arXiv:1908.03265): Adam without a second moment until that has seen enough; decay as in adamw.
    - "sgd": momentum betas[0], without dampening or Nesterov; decay x weight is added to the gradient. The second beta
      and epsilon are not used, and its learning rate is on another scale than that of the others.
    - "lamb" (arXiv:1904.00962): for very large batches.
    - "muon" (arXiv:2502.16982): see `muon_and_adamw`.

    Args:
        name: one of `OPTIMIZERS`.
        model: what is trained.
        learning_rate: until the loop assigns another to `param_groups`.
        betas: decay of the first and the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: of matrices, embeddings included.

    Raises:
        UserError: an unknown name, the package that holds the optimizer is missing or too old, or it has nothing to do.
    """
    adam: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": epsilon}
    groups = parameter_groups(model, weight_decay)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, **adam, fused=True),
        "adam": lambda: torch.optim.Adam(groups, **adam, fused=True),
        "radam": lambda: torch.optim.RAdam(groups, **adam, decoupled_weight_decay=True),
        "sgd": lambda: torch.optim.SGD(groups, lr=learning_rate, momentum=betas[0]),
        "lamb": lambda: _lamb(groups, adam),
        "muon": lambda: muon_and_adamw(model, weight_decay, adam),
    }
    if name not in makers:
        raise UserError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name}")
    return makers[name]()


def _lamb(groups: list[dict[str, object]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    """LAMB as in the paper: its version without correction of the bias."""
    try:
        from pytorch_optimizer import Lamb
    except ImportError:
        raise UserError("--optimizer lamb needs: pip install pytorch_optimizer") from None
    # As in the paper: decay is part of the update that the trust ratio scales, and the step size is not
    # enlarged early on (adam_debias says the opposite of its name). The loop clips gradients itself.
    optimizer: torch.optim.Optimizer = Lamb(groups, **adam, weight_decouple=False, max_grad_norm=0.0, adam_debias=True)
    return optimizer


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of the stacked layers, which are what Muon was made for.

    Layers are what lies in an nn.ModuleList, as in every family of transformers. So embeddings, output heads (tied or
    not, over the vocabulary or over labels), and the single layers between them and the stack are no hidden matrices;
    nor is an embedding within a layer.
    """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    stacked = {parameter for stack in stacks for parameter in stack.parameters()} - tables
    return [p for p in model.parameters() if p in stacked and p.ndim == 2 and p.requires_grad]


def muon_and_adamw(model: nn.Module, weight_decay: float, adam: dict[str, Any]) -> torch.optim.Optimizer:
    """Muon for the hidden matrices, AdamW for the rest, under one learning rate and one weight decay.

    Muon (https://kellerjordan.github.io/posts/muon/, arXiv:2502.16982) makes each matrix's momentum (0.95, Nesterov)
    nearly orthogonal. The update is scaled by 0.2 x sqrt(longer side) to the size of an update of AdamW (section 2.2
    of the paper), so that AdamW's learning rate and decay fit. Queries, keys and values are orthogonalised together
    where a model keeps them in one matrix (GPT-2, ModernBERT).

    Args:
        model: what is trained.
        weight_decay: of matrices.
        adam: lr, betas and eps of AdamW; Muon takes the lr.

    Raises:
        UserError: this torch has no Muon, or the model has no hidden matrix to train.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optimizer muon needs torch 2.9 or newer, this is {torch.__version__}")
    hidden = hidden_matrices(model)
    if not hidden:
        raise UserError("--optimizer muon found no matrix to train in the layers of the model; use adamw")
    matrices = [{"params": hidden, "weight_decay": weight_decay}]
    rest = parameter_groups(model, weight_decay, leave_out=hidden)
    return _TwoOptimizers(
        _divided_muon()(matrices, lr=adam["lr"], momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, **adam, fused=True),
    )


@cache
def _divided_muon() -> Callable[..., torch.optim.Optimizer]:
    """Muon whose matrices are divided among the processes; made here, as a torch before 2.9 has none to derive from."""

    class DividedMuon(torch.optim.Muon):
        """Each process orthogonalises its share of the matrices, and gives the others the weights.

        The products, in bfloat16, are most of a step of Muon. Machines of different kinds round them differently: as
        weights are handed over and not computed twice, the copies of these matrices stay the same. All processes keep
        every momentum.
        Sharded matrices (FSDP2) are left to torch.
        """

        found_inf: Tensor | None = None  # 1 where gradients are not to be used, as fused optimizers of torch have it

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            (group,) = whole = self.param_groups
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            size = dist.get_world_size() if dist.is_initialized() else 1
            is_divided = size > 1 and bool(matrices) and not any(hasattr(matrix, "full_tensor") for matrix in matrices)
            shares = _equal_shares(matrices, size) if is_divided else []
            own = shares[dist.get_rank()] if is_divided else matrices
            momenta = {m: self.state[m].setdefault("momentum_buffer", torch.zeros_like(m)) for m in matrices}
            before = []
            if self.found_inf is not None:  # a momentum moves towards itself, and weights come back: nobody waits
                before = [matrix.clone() for matrix in own]
                for matrix, momentum in momenta.items():
                    matrix.grad = torch.where(self.found_inf > 0, momentum, matrix.grad)
            for matrix in momenta.keys() - set(own):
                momenta[matrix].lerp_(matrix.grad, 1 - group["momentum"])
            self.param_groups = [{**group, "params": own}]
            super().step()  # type: ignore[no-untyped-call]
            self.param_groups = whole
            for matrix, old in zip(own, before):
                matrix.copy_(torch.where(self.found_inf > 0, old, matrix))  # type: ignore[operator, arg-type]
            if is_divided:
                _give_out(shares)

    return DividedMuon


def _equal_shares(matrices: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """Matrices for each of so many processes, which cost about the same: the costliest first, to who has least."""
    shares, costs = [list[Tensor]() for _ in range(size)], [0] * size

    def cost(matrix: Tensor) -> int:  # of a product of the shorter side with itself
        return min(matrix.shape) * matrix.numel()

    for matrix in sorted(matrices, key=cost, reverse=True):
        least = costs.index(min(costs))
        shares[least].append(matrix)
        costs[least] += cost(matrix)
    return shares


def _give_out(shares: Sequence[Sequence[Tensor]]) -> None:
    """Every process's share, as that process has it, on all."""
    lengths = [sum(matrix.numel() for matrix in share) for share in shares]
    given, got = (shares[0][0].new_empty(rows, max(lengths)) for rows in (1, len(shares)))
    rank = dist.get_rank()

    def parts(row: Tensor, share: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        sizes = [matrix.numel() for matrix in share]
        pieces = torch.split(row[: sum(sizes)], sizes) if share else ()
        return ((matrix, piece.view_as(matrix)) for matrix, piece in zip(share, pieces, strict=True))

    for matrix, piece in parts(given[0], shares[rank]):
        piece.copy_(matrix)
    dist.all_gather([*got], given[0])
    for share, row in zip(shares, got, strict=True):
        for matrix, piece in parts(row, share):
            matrix.copy_(piece)


class _TwoOptimizers(torch.optim.Optimizer):
    """Two optimizers over different parameters that pass for one: one list of groups, one state.

    `param_groups` holds the very dicts of the two. Whoever loads a state may put new dicts in their place
    (`Optimizer.load_state_dict`, which Accelerate calls when it prepares an optimizer), so each step hands the two
    what is here now.
    """

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self._two = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = iter(self.param_groups)
        for optimizer in self._two:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state
            optimizer.found_inf = getattr(self, "found_inf", None)  # type: ignore[attr-defined]
            optimizer.step()
        return loss


# ---- the average of the weights ------------------------------------------------------------------------------------
# While the learning rate is high, the average of about the last 1 / (1 - decay) steps tends to be a better model than
# the newest weights (arXiv:2502.06761). It is kept beside the run in one more copy of the weights, never trained on.

_COUNT = "n_averaged"


def start_average(objective: nn.Module, decay: float | None) -> AveragedModel | None:
    """An average of no step yet; its `module` is a copy of the objective, in eval mode and without gradients.

    After step t it is the mean of the weights after steps 1 to t, each weighted by decay to the power of its age. The
    weights are made to sum to 1 at every t, so that the first update is a copy and an early average does not lean on
    the initial weights (the correction of Adam's moments, arXiv:1412.6980, section 3). Parameters that modules share
    are shared in the copy, and averaged once. Buffers are copied, not averaged.

    Args:
        objective: what is trained, before `lmscripts.training.processes.prepare`, which takes both.
        decay: in (0, 1); None for no average.

    Returns:
        The average; None without a decay.

    Raises:
        UserError: the decay is out of range, or the parameters are in half precision.
    """
    if decay is None:
        return None
    if not 0 < decay < 1:
        raise UserError(f"the decay of the average must lie between 0 and 1, got {decay}")
    for name, parameter in objective.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{name} is in {parameter.dtype}, too coarse for an average: keep the weights in float32")
    average = AveragedModel(nn.Identity())
    average.multi_avg_fn = _mover(decay, average.n_averaged)
    average.module = _copy(objective).requires_grad_(False).eval()
    return average


def _copy(objective: nn.Module) -> nn.Module:
    """A deep copy, except for Python modules (of the model's family), which `AveragedModel` itself fails to copy."""
    values = (value for module in objective.modules() for value in vars(module).values())
    return copy.deepcopy(objective, {id(value): value for value in values if isinstance(value, ModuleType)})


def _mover(decay: float, steps: Tensor) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """What moves averages of so many steps towards the weights after the next.

    The steps are read from the average's own counter, on the CPU: the one that torch hands over is on the device, and
    reading it would wait for the device.
    """

    @torch.no_grad()
    def move(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        share = (1 - decay) / (1 - decay ** (int(steps) + 1))
        torch._foreach_lerp_(list(averages), list(weights), share)

    return move


def update_average(average: AveragedModel, objective: nn.Module) -> None:
    """Take the weights after an optimizer step into the average."""
    average.update_parameters(objective)


def average_state(average: AveragedModel) -> dict[str, Tensor]:
    """The averages by parameter name, which may be sharded, and the number of steps; all are the average's own.

    A shared parameter is there once, under its first name. Buffers are the objective's, and saved with it.
    """
    return {n: parameter.detach() for n, parameter in average.module.named_parameters()} | {_COUNT: average.n_averaged}


@torch.no_grad()
def load_average(average: AveragedModel, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `average_state` gave; updates go on bit for bit as if nothing had happened.

    Raises:
        UserError: names or shapes differ; the average is as it was.
    """
    own = dict(average.module.named_parameters()) | {_COUNT: average.n_averaged}
    if differing := sorted(set(own) ^ set(tensors)):
        place = "misses" if differing[0] in own else "has too many:"
        raise UserError(f"the saved average is of another model: it {place} {differing[0]}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
            raise UserError(f"the saved average is of another model: {name} has the shape {shapes}")
    for name, tensor in own.items():
        tensor.copy_(part_like(tensors[name], tensor))

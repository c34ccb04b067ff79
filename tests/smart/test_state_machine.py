"""Any order of whatever a training script does, beside a plain loop that never heard of the regularizers.

With λ_s = μ = 0 the weights, buffers, attributes and random state are those of the plain loop bit for bit, nothing is
left over between calls, and the teacher is where its closed form says. The budget is small; for the long run:

    SMARTREG_MACHINE_EXAMPLES=10000 pytest tests/smart/test_state_machine.py
"""

import contextlib
import copy
import io
import os
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from smartreg import MomentumBregman, SmartLoss
from smartreg._model import embedding as embedding_wing
from smartreg._model.embedding import EmbeddingHook

EXAMPLES = int(os.environ.get("SMARTREG_MACHINE_EXAMPLES", "10"))
VOCABULARY, FEATURES, CLASSES, TOKENS = 11, 3, 3, 4


class Model(nn.Module):
    """With all that a pass may leave behind: batch statistics, draws, a list and a tensor that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.body = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.trace: list[int] = []
        self.passes = torch.zeros(1)
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def encode(self, ids: Tensor) -> Tensor:
        self.trace.append(len(self.trace))
        self.passes += 1
        return torch.tanh(self.norm(self.body(self.dropout(self.embedding(ids)).mean(dim=1))))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encode(ids))

    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.encode(a) * self.encode(b))


class Loop:
    """A model and its optimizer, trained by the task loss alone."""

    def __init__(self) -> None:
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)

    def backward(self, outputs: Tensor, labels: Tensor, extra: Tensor | float = 0.0) -> None:
        (nn.functional.cross_entropy(outputs, labels) + 0.0 * extra).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


OPTIONS = st.fixed_dictionaries(
    {
        "memory_efficient": st.booleans(),
        "steps": st.integers(0, 2),
        "start": st.sampled_from(["noise", "gradient", "towards_uniform"]),
        "ascent": st.sampled_from(["projected", "steepest", "normalized"]),
        "norm": st.sampled_from(["inf", "2"]),
        "norm_over": st.sampled_from(["example", "token"]),
        "epsilon_scale": st.sampled_from(["rms", "absolute"]),
        "detach_reference": st.booleans(),
        "check_first_call": st.booleans(),
        "divergence": st.sampled_from(["symmetric_kl", "mse", "jensen_shannon"]),
    }
)


class Failure(Exception):
    pass


class Machine(RuleBasedStateMachine):
    """`ours` is trained with regularizers of weight 0, `plain` without them."""

    @initialize(options=OPTIONS)
    def begin(self, options: dict[str, Any]) -> None:
        self.ours, self.plain, self.time = Loop(), Loop(), 0
        self.smarts = [self.made(options)]
        self.bregman = MomentumBregman(self.ours.model, beta=0.8)
        self.average = {name: p.detach().clone() for name, p in self.ours.model.named_parameters()}

    def made(self, options: dict[str, Any]) -> SmartLoss:
        return SmartLoss(self.ours.model, generator=torch.Generator().manual_seed(7), **options)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """New data, and the random state that both loops start from."""
        self.time += 1
        generator = torch.Generator().manual_seed(self.time)
        a, b = torch.randint(1, VOCABULARY, (2, 3, TOKENS), generator=generator)
        return a, b, torch.randint(CLASSES, (3,), generator=generator)

    def both(self, ours: Any, plain: Any) -> None:
        """Both under one seed; what either has drawn is then the same."""
        torch.manual_seed(self.time)
        ours()
        state = torch.get_rng_state()
        torch.manual_seed(self.time)
        plain()
        assert torch.equal(torch.get_rng_state(), state)

    @rule()
    def clean_step(self) -> None:
        a, _, labels = self.batch()
        self.both(*(lambda loop=loop: loop.backward(loop.model(a), labels) for loop in (self.ours, self.plain)))

    @precondition(lambda self: self.smarts)
    @rule(index=st.integers(0, 9), two=st.booleans(), masked=st.booleans())
    def smart_step(self, index: int, two: bool, masked: bool) -> None:
        a, b, labels = self.batch()
        mask = torch.ones(3, TOKENS).index_fill_(1, torch.tensor([TOKENS - 1]), 0) if masked else None
        smart = self.smarts[index % len(self.smarts)]
        lookups = 2 if two else 1

        def ours() -> None:
            call = (lambda m: m.pair(a, b)) if two else (lambda m: m(a))
            outputs, penalty = smart(call, mask=None if mask is None else [mask] * lookups)
            assert penalty.item() >= -1e-12
            self.ours.backward(outputs, labels, penalty)

        plain = self.plain
        self.both(ours, lambda: plain.backward(plain.model.pair(a, b) if two else plain.model(a), labels))

    @rule()
    def bregman_step(self) -> None:
        a, _, labels = self.batch()

        def ours() -> None:
            outputs = self.ours.model(a)
            state = torch.get_rng_state()
            self.ours.backward(outputs, labels, self.bregman(lambda m: m(a), outputs))
            assert torch.equal(torch.get_rng_state(), state)

        self.both(ours, lambda: self.plain.backward(self.plain.model(a), labels))

    @precondition(lambda self: self.smarts)
    @rule(index=st.integers(0, 9), at=st.integers(1, 4), error=st.sampled_from([Failure, KeyboardInterrupt]))
    def broken_call(self, index: int, at: int, error: type[BaseException]) -> None:
        a, _, _ = self.batch()
        calls = []

        def forward(m: Model) -> Tensor:
            calls.append(None)
            outputs = m(a)
            if len(calls) == at:
                raise error
            return outputs

        def ours() -> None:
            try:
                self.smarts[index % len(self.smarts)](forward)
            except (Failure, KeyboardInterrupt):
                assert len(calls) == at

        self.both(ours, lambda: self.plain.model(a))

    @rule()
    def broken_teacher(self) -> None:
        a, _, _ = self.batch()

        def forward(m: Model) -> Tensor:
            m(a)
            raise Failure

        def ours() -> None:
            outputs = self.ours.model(a)
            state = torch.get_rng_state()
            with contextlib.suppress(Failure):
                self.bregman(forward, outputs)
            torch.set_rng_state(state)

        self.both(ours, lambda: self.plain.model(a))

    @rule()
    def update(self) -> None:
        self.bregman.update()
        for name, parameter in self.ours.model.named_parameters():
            self.average[name] = 0.2 * parameter.detach() + 0.8 * self.average[name]

    @rule(options=OPTIONS)
    def another(self, options: dict[str, Any]) -> None:
        self.smarts.append(self.made(options))

    @precondition(lambda self: self.smarts)
    @rule(index=st.integers(0, 9))
    def remove(self, index: int) -> None:
        self.smarts.pop(index % len(self.smarts)).remove()

    @rule(train=st.booleans())
    def switch_mode(self, train: bool) -> None:
        for loop in (self.ours, self.plain):
            loop.model.train(train)

    @rule(part=st.sampled_from(["embedding", "body", "head"]), trains=st.booleans())
    def freeze(self, part: str, trains: bool) -> None:
        for loop in (self.ours, self.plain):
            loop.model.get_submodule(part).requires_grad_(trains)
        if not any(p.requires_grad for p in self.ours.model.parameters()):
            for loop in (self.ours, self.plain):
                loop.model.norm.requires_grad_(True)

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        parts = {"model": self.ours.model, "optimizer": self.ours.optimizer, "bregman": self.bregman}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        old, loop = self.ours.model, Loop()
        loop.model.trace, loop.model.passes = list(old.trace), old.passes.clone()
        for ours, theirs in zip(loop.model.modules(), old.modules(), strict=True):
            ours.training = theirs.training
        for ours, theirs in zip(loop.model.parameters(), old.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        updates = self.bregman.updates
        for smart in self.smarts:
            smart.remove()
        self.ours, self.bregman = loop, MomentumBregman(loop.model, beta=0.8)
        loop.model.load_state_dict(saved["model"])
        loop.optimizer.load_state_dict(saved["optimizer"])
        self.bregman.load_state_dict(saved["bregman"])
        assert self.bregman.updates == updates
        self.smarts = [self.made({"memory_efficient": updates % 2 == 1})]

    @rule()
    def copy_all(self) -> None:
        """The copies go on in place of the originals, which may be collected."""
        together = copy.deepcopy((self.ours, self.bregman, self.smarts))
        for smart in self.smarts:
            smart.remove()
        self.ours, self.bregman, self.smarts = together

    @invariant()
    def same_as_the_plain_loop(self) -> None:
        if not hasattr(self, "ours"):
            return
        ours, plain = self.ours.model, self.plain.model
        for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs), name
            assert mine.requires_grad == theirs.requires_grad, name
            assert mine.grad is None, name
            assert not mine._backward_hooks, name
        for (name, mine), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(mine, theirs), name
        assert ours.trace == plain.trace
        assert torch.equal(ours.passes, plain.passes)
        assert [m.training for m in ours.modules()] == [m.training for m in plain.modules()]
        assert vars(ours).keys() == vars(plain).keys()

    @invariant()
    def nothing_is_left_over(self) -> None:
        if not hasattr(self, "ours"):
            return
        assert not embedding_wing._UNDER_WAY
        hooks = [hook for m in self.ours.model.modules() for hook in m._forward_hooks.values()]
        live = [hook for hook in hooks if isinstance(hook, EmbeddingHook)]
        assert len(live) <= 1
        assert not any(m._forward_pre_hooks or m._backward_hooks for m in self.ours.model.modules())

    @invariant()
    def teacher_meets_its_closed_form(self) -> None:
        if not hasattr(self, "ours"):
            return
        for name, average in self.bregman.teacher.named_parameters():
            torch.testing.assert_close(average, self.average[name], rtol=1e-10, atol=1e-12, msg=name)
            assert not average.requires_grad


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=10,
    deadline=None,
    derandomize=EXAMPLES < 100,  # the same in every run of the suite, others in a long one
    suppress_health_check=list(HealthCheck),
    database=None,
)

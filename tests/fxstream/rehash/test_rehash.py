"""Step Rehash: where in a generation a call stands, what is skipped, what is held, and errors."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxstream
from fxstream import StepRehash
from fxstream.passes.rewriting.lower import _PARTS, CompiledPart
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak
from tests.denoiser import CHANNELS, Denoiser, generate, latent, times


@pytest.fixture(scope="module")
def model():
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shared(model):
    """One module for many tests: capturing takes longer than they do."""
    return {}


@pytest.fixture
def rehashed(model, shared):
    def make(**settings):
        key = repr(sorted(settings.items()))
        if key not in shared:
            shared[key] = StepRehash(**settings).around(model)
        shared[key].reset()
        return shared[key]

    return make


def counts(module):
    stats = module.stats()
    return stats.full_steps, stats.skipped_steps


class TestSchedule:
    def test_every(self, rehashed):
        module = rehashed(every=2)
        generate(module, steps=7)
        assert counts(module) == (4, 3)

    def test_key_steps(self, rehashed):
        module = rehashed(key_steps=[0, 1, 4])
        generate(module, steps=7)
        assert counts(module) == (3, 4)

    def test_warm_up_and_cool_down(self, rehashed):
        module = rehashed(every=100, warm_up=2, cool_down=1, steps=7)
        generate(module, steps=7)
        assert counts(module) == (3, 4)

    def test_threshold_and_its_cap(self, rehashed):
        loose, tight = rehashed(threshold=100.0, max_skips=2), rehashed(threshold=1e-9)
        generate(loose, steps=7)
        generate(tight, steps=7)
        assert counts(loose) == (3, 4)
        assert counts(tight) == (7, 0)

    def test_a_tight_threshold_is_exact(self, model, rehashed):
        assert relative_l2(generate(rehashed(threshold=1e-9)), generate(model)) <= 1e-6

    def test_full_steps_alone_are_exact(self, model, rehashed):
        assert relative_l2(generate(rehashed(every=1)), generate(model)) <= 1e-6


class TestValues:
    def test_a_skipped_step_at_the_same_inputs_is_exact(self, model, rehashed):
        """The cut's value is then the true one, but for the timestep."""
        module, x = rehashed(every=2, cut="up_blocks.1"), latent()
        module(x, torch.tensor(500.0))
        near = module(x, torch.tensor(499.999))
        assert counts(module) == (1, 1)
        assert relative_l2(near, model(x, torch.tensor(499.999))) <= 1e-5

    def test_the_papers_cut_returns_the_last_output(self, rehashed):
        module = rehashed(every=2, cut="paper")
        first = module(latent(0), torch.tensor(500.0))
        assert torch.equal(module(latent(1), torch.tensor(400.0)), first)

    def test_the_caller_may_write_into_results(self, rehashed):
        module = rehashed(every=2, cut="paper")
        first = module(latent(0), torch.tensor(500.0))
        kept = first.clone()
        first.zero_()
        assert torch.equal(module(latent(1), torch.tensor(400.0)), kept)

    @pytest.mark.parametrize("order", [1, 2])
    def test_taylor_is_exact_on_polynomials_of_its_order(self, order):
        """From the first step on at which its own prediction could be held against a full step."""

        class Polynomial(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = nn.Linear(4, 4)

            def forward(self, sample, timestep):
                t = timestep / 100
                return (self.block(sample) + 2 * t + (t * t if order == 2 else 0)).reshape(4, 3) + timestep * 0

        model = Polynomial().eval().requires_grad_(False)
        # The addition of the last power is the value that depends on time; it is cut by its node.
        module = StepRehash(every=2, cut="view", predictor="taylor", order=order).around(model)
        x = torch.randn(3, 4)
        for step, time in enumerate(range(900, 0, -100)):
            found, expected = module(x, torch.tensor(float(time))), model(x, torch.tensor(float(time)))
            if step > 2 * (order + 1):
                assert relative_l2(found, expected) <= 1e-5
        assert counts(module) == (5, 4)

    def test_drift_is_measured(self, rehashed):
        module = rehashed(every=2)
        generate(module, steps=7)
        drift = module.stats().drift
        assert set(drift) == {2, 4, 6}
        assert all(0 < value < 10 for value in drift.values())

    def test_flops_saved(self, rehashed):
        module = rehashed(every=2)
        generate(module, steps=7)
        (plan,) = module.plans
        assert plan.skip_flops <= 0.2 * plan.full_flops
        assert module.stats().flops_saved == 3 * (plan.full_flops - plan.skip_flops)


class TestPlace:
    def test_a_new_generation(self, rehashed):
        module = rehashed(every=2)
        expected = generate(module, steps=7, seed=1)
        generate(module, steps=7, seed=2)
        assert torch.equal(generate(module, steps=7, seed=1), expected)
        assert counts(module) == (12, 9)

    def test_one_that_begins_where_the_last_was_left(self, rehashed):
        """After a generation of one step, another with another latent at the same timestep."""
        module, time = rehashed(every=2), torch.tensor(500.0)
        for seed in range(4):
            module(latent(seed), time)
        assert counts(module) == (4, 0)

    def test_the_same_call_again_and_again_holds_one_cache(self, rehashed):
        module, x, time = rehashed(every=2, steps=4), latent(), torch.tensor(500.0)
        for _ in range(4):
            module(x, time)
        assert counts(module) == (4, 0)
        assert module.plans[0].calls == 1

    def test_another_batch(self, rehashed):
        module = rehashed(every=2)
        module(latent(), torch.tensor(500.0))
        module(latent(batch=2), torch.tensor(400.0))
        assert counts(module) == (2, 0)

    def test_timesteps_that_rise(self, model, rehashed):
        """A model whose time rises is found out after two steps."""
        module, x = rehashed(every=2), latent()
        for time in (0.0, 100.0, 200.0, 300.0, 400.0, 500.0):
            module(x, torch.tensor(time))
        full, skipped = counts(module)
        assert full + skipped == 6
        assert skipped >= 2

    def test_branches_of_guidance_keep_a_cache_each(self, model, rehashed):
        labels = (torch.zeros(1, CHANNELS), torch.ones(1, CHANNELS))
        module = rehashed(every=2, steps=7)
        found = generate(module, steps=7, labels=labels)
        assert counts(module) == (4, 3)
        assert module.plans[0].calls == 2
        assert module.plans[0].held_bytes == 2 * module.plans[0].cut_bytes
        # Each branch takes its own value, as two modules that see one branch each would.
        alone = [rehashed(every=2, warm_up=1), rehashed(every=2, warm_up=1, max_skips=9)]
        x = latent()
        for time in times(7):
            x = x - sum(part(x, time, label) for part, label in zip(alone, labels, strict=True)) / 14
        assert torch.equal(found, x)

    def test_a_second_evaluation_keeps_a_cache_of_its_own(self, rehashed):
        """As Heun's scheduler calls: once at the first timestep, twice at the others, with two latents."""
        module = rehashed(every=2, steps=5)
        for step, time in enumerate(times(5)):
            for call in range(1 if step == 0 else 2):
                module(latent(10 * step + call), time)
        assert counts(module) == (3, 2)
        assert module.plans[0].calls == 2

    def test_threads_do_not_share(self, rehashed):
        module = rehashed(every=2)
        alone = [generate(module, steps=6, seed=seed) for seed in range(2)]
        found, ready = {}, threading.Barrier(2)

        def run(seed):
            ready.wait()
            found[seed] = generate(module, steps=6, seed=seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[seed], alone[seed]) for seed in range(2))

    def test_two_modules_do_not_share(self, model):
        one, other = (StepRehash(every=2).around(model) for _ in range(2))
        one(latent(), torch.tensor(500.0))
        other(latent(), torch.tensor(400.0))
        assert counts(one) == counts(other) == (1, 0)


class TestControl:
    def test_disabled(self, model, rehashed):
        module = rehashed(every=2)
        module.enabled = False
        assert relative_l2(generate(module), generate(model)) <= 1e-6
        assert counts(module) == (0, 0)
        module.enabled = True
        generate(module)
        assert counts(module) == (3, 3)

    def test_reset(self, rehashed):
        module = rehashed(every=2)
        module(latent(), torch.tensor(500.0))
        module.reset()
        module(latent(), torch.tensor(400.0))
        assert counts(module) == (1, 0)

    def test_it_stands_where_the_model_stood(self, model, rehashed):
        module = rehashed(every=2)
        assert isinstance(module, Denoiser)
        assert list(module.state_dict()) == list(model.state_dict())

    def test_a_step_that_fails_leaves_nothing(self, model, rehashed):
        module = rehashed(every=2, steps=6)
        module(latent(), torch.tensor(500.0))
        (graphs,) = module._compiled.values()
        planned = graphs.planned(1)

        def fail(*tensors):
            raise RuntimeError("out of memory")

        for broken in ("full", "skip"):
            module.reset()
            module(latent(), torch.tensor(500.0))
            if broken == "full":
                module(latent(), torch.tensor(450.0))
            graphs._planned[1] = replace(planned, **{broken: fail})
            with pytest.raises(RuntimeError, match="out of memory"):
                module(latent(), torch.tensor(400.0))
            graphs._planned[1] = planned
            found = module(latent(1), torch.tensor(300.0))
            assert relative_l2(found, model(latent(1), torch.tensor(300.0))) <= 1e-6


class TestCompile:
    def test_both_graphs_are_compiled_once(self, model):
        """They serve all steps of all generations."""
        rehash = StepRehash(cut="deepcache", every=2, warm_up=2)
        expected = generate(fxstream.optimize(model, 0.95, step_rehash=rehash), steps=7)
        module = fxstream.optimize(model, 0.95, step_rehash=rehash, compile="aot_eager")
        found = generate(module, steps=7)
        assert relative_l2(found, expected) <= 1e-5
        ((graphs,), parts) = module._compiled.values(), len(_PARTS)
        (planned,) = graphs._planned.values()
        lowered = [part for run in (planned.full, planned.skip) for part in run.__self__.modules()]
        assert any(isinstance(part, CompiledPart) for part in lowered)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(generate(module, steps=7), found)
        assert len(_PARTS) == parts

    def test_a_compiled_caller_leaves_it_alone(self, rehashed):
        module, backend = rehashed(every=2), CompileCounterWithBackend("eager")
        expected = generate(module, steps=5)
        module.reset()
        doubled = torch.compile(lambda x, time: 2 * module(2 * x, time, None), backend=backend)
        x = latent()
        with torch.no_grad():
            for time in times(5):
                x = x - doubled(x / 2, time) / 10
        assert torch.equal(x, expected)
        assert counts(module) == (3, 2)


class TestBudget:
    @pytest.mark.parametrize("settings", [{}, {"predictor": "taylor"}, {"threshold": 1.0, "predictor": "taylor"}])
    def test_the_peak_is_within_it_the_cache_included(self, model, settings):
        """The lowest budget that there is, asked for in bytes."""
        rehash, args = StepRehash(cut="deepcache", **settings), (latent(), torch.tensor(500.0), None)
        lowest = fxstream.optimize(model, "min", args, step_rehash=rehash).plans[0]
        budget = lowest.full.weight_bytes + lowest.full.input_bytes + lowest.peak_bytes
        module = fxstream.optimize(model, budget, args, step_rehash=rehash)
        (plan,) = module.plans
        assert plan.held_bytes == plan.cut_bytes * (2 if "predictor" in settings else 1)
        assert plan.peak_bytes <= lowest.peak_bytes
        generate(module, steps=7)
        module.reset()
        measured = measure_peak(generate, module, 7)
        # Beside it: the latent and its successors, and samples of the inputs and of the cut.
        assert measured.peak_bytes <= plan.peak_bytes + 4 * latent().nbytes + 8 * 4 * plan.cut_bytes

    def test_one_that_the_cache_does_not_fit(self, model):
        lowest = fxstream.plan(model, (latent(), torch.tensor(500.0)))
        budget = lowest.weight_bytes + lowest.input_bytes + lowest.after.peak_bytes
        module = fxstream.optimize(model, budget, step_rehash=StepRehash(cut="deepcache", predictor="taylor", order=2))
        with pytest.raises(fxstream.MemoryBudgetError, match="Held between steps"):
            module(latent(), torch.tensor(500.0))


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"every": 0}, "every=0 is out of range"),
            ({"every": 2, "threshold": 0.1}, "every and threshold are both schedules"),
            ({"key_steps": [0, 4, 2]}, "not ascending"),
            ({"key_steps": [0, 2, 2]}, "not ascending"),
            ({"key_steps": [1, 2]}, "does not begin with step 0"),
            ({"key_steps": [0, -1]}, "not ascending"),
            ({"key_steps": []}, "does not begin with step 0"),
            ({"key_steps": [0, 2.5]}, "is no list of steps"),
            ({"key_steps": 3}, "key_steps=3 is no list of steps"),
            ({"cut": []}, r"cut=\[\] is no cut"),
            ({"cut": 3}, "cut=3 is no cut"),
            ({"cut": ""}, "cut='' is no cut"),
            ({"calibration": "map.json", "full_steps": 3}, "calibration='map.json' is none"),
            ({"key_steps": [0, 25], "steps": 25}, "key step 25 is out of range: of 25 steps the last is 24"),
            ({"threshold": 0.0}, "threshold=0.0 is out of range"),
            ({"max_skips": 0}, "max_skips=0 is out of range"),
            ({"cool_down": 1}, "cool_down needs steps"),
            ({"keep": 1.5}, "keep=1.5 is out of range"),
            ({"predictor": "magic"}, "predictor='magic' is none of reuse, taylor"),
            ({"order": 3}, "order=3 is out of range"),
            ({"full_steps": 13}, "give calibration"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            StepRehash(**settings)

    def test_no_settings(self, model):
        with pytest.raises(TypeError, match="step_rehash='auto' is no StepRehash"):
            fxstream.optimize(model, "min", step_rehash="auto")

    def test_a_generation_of_more_steps(self, rehashed):
        module = rehashed(every=2, steps=5)
        with pytest.raises(ValueError, match="the schedule is for 5 steps, but this generation goes on"):
            generate(module, steps=6)

    def test_a_cut_that_does_not_exist(self, model):
        with pytest.raises(ValueError, match=r"there is no cut 'up_blocks.7'"):
            StepRehash(cut="up_blocks.7").around(model)(latent(), torch.tensor(500.0))

    def test_a_timestep_that_is_a_number(self, model):
        with pytest.raises(ValueError, match=r"timestep of Denoiser is 500, but .* as a tensor"):
            StepRehash().around(model)(latent(), 500)

    def test_no_timestep(self):
        class Clockless(nn.Module):
            def forward(self, x, clock):
                return x * clock

        clock = torch.ones(2, 3)
        message = r"no argument of Clockless is called timestep.*StepRehash\(timestep=...\)"
        with pytest.raises(ValueError, match=message):
            StepRehash().around(Clockless())(torch.ones(2, 3), clock)

    def test_a_model_that_has_nothing_to_cut(self):
        class Flat(nn.Module):
            def forward(self, sample, timestep):
                return sample * timestep

        with pytest.raises(ValueError, match="leaves nothing to skip"):
            StepRehash().around(Flat())(torch.ones(2, 3), torch.tensor(1.0))


def test_the_timestep_by_another_name():
    class Renamed(Denoiser):
        def forward(self, sample, when):
            return super().forward(sample, when)

    module = StepRehash(every=2).around(Renamed().eval())
    named = StepRehash(every=2, timestep="when").around(Renamed().eval())
    assert torch.equal(generate_unlabelled(module), generate_unlabelled(named))
    assert counts(module) == counts(named) == (2, 2)


def generate_unlabelled(model):
    x = latent()
    with torch.no_grad():
        for time in times(4):
            x = x - model(sample=x, when=time) / 4
    return x

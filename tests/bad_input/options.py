"""Options out of range, misspelt, or impossible together."""

from typing import Any

import numpy as np
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
)

from bad_input.case import Case, Place
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.margins import MarginModule
from lightning_modules.preference import PreferenceModule
from mixdpo import losses
from mixdpo.batches.steps import Slices, plan_stages
from mixdpo.data.sources import open_source
from mixdpo.evaluation.generation import generate
from mixdpo.losses.preference_loss import HYPER_PARAMETERS
from mixdpo.options import options
from mixdpo.routing.route import Routing
from mixdpo.signals.signals import ImplicitReward, RewardModel
from mixdpo.token_cleaning.cleaning import Cleaning, weigh
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss, Random
from mixdpo.token_cleaning.selection import Selection, select

NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = {
    "beta": 0,
    "label_smoothing": 0.5,
    "gamma_ratio": -1,
    "delta": -0.1,
    "nll_weight": -1,
    "odds_weight": -2,
    "length_penalty": -1,
    "drop_penalty": -1,
    "tail_weight": 1.1,
    "sensitivity": -1,
}
# class, options -> what is said
CONSTRUCTED: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
    (Routing, {"threshold": 0.5, "hard_fraction": 0.12}, ("give hard_fraction or threshold, not both (0.12 and 0.5)",)),
    (Routing, {"hard_fraction": 1.2}, ("routing.hard_fraction (1.2) must lie",)),
    (Routing, {"threshold": INF}, ("routing.threshold (inf) must be finite",)),
    (Routing, {"order": "sft_frist"}, ("routing.order must be one of", "not 'sft_frist'; did you mean 'sft_first'?")),
    (Routing, {"reshuffle": True}, ("easy_to_hard has nothing to shuffle", "set it to false")),
    (Slices, {"count": 3, "only": [2, 0]}, ("slices.only must name slices once, in rising order",)),
    (Selection, {"keep_ratio": 0.5, "threshold": 0.0}, ("selection: give keep_ratio or threshold,",)),
    (Selection, {"keep_ratio": 0.0}, ("selection.keep_ratio must lie in (0, 1]", "1 keeps every token")),
    (Selection, {"threshold": -INF}, ("selection.threshold must be finite",)),
    (Cleaning, {"scorer": len}, ("a role in `roles` of", "not None")),
    (Cleaning, {"scorer": Loss("policy"), "selection": Selection()}, ("scores with the policy", "scope batch")),
    (
        Cleaning,
        {"scorer": Loss("policy"), "masks": "x", "selection": Selection(scope="batch")},
        ("leave out cleaning.masks",),
    ),
    (ExcessLoss, {"worse": "base", "better": "base"}, ("every score is 0", "name two roles")),
    (
        Cleaning,
        {"scorer": ExcessLoss(better="reference")},
        ("must be one of base", "did you mean 'cleaning_reference'?"),
    ),
    (losses.DPO, {"beta": NAN}, ("preference_loss.beta must be > 0", "nan")),
]
MODULES: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
    (PreferenceModule, {"cleaning": Cleaning(warm_up_stages=1)}, ("warm_up_stages belongs to SFT",)),
    (
        PreferenceModule,
        {"cleaning": Cleaning(scorer=Loss("policy"), selection=Selection(scope="batch"))},
        ("reads the policy of each step", "give worse or role base"),
    ),
    (MarginModule, {"signal": ImplicitReward()}, ("model.adapter is None", "needs one")),
    (MarginModule, {"signal": RewardModel(), "adapter": "x"}, ("model.adapter is x", "needs none")),
]


def loss_case(option: str, value: float) -> Case:
    kind = next(
        kind for kind in vars(losses).values() if option in getattr(kind, "__dataclass_fields__", {"sensitivity"})
    )
    kind = losses.BetaDPO if option == "sensitivity" else kind
    says = (f"preference_loss.{option} must be", HYPER_PARAMETERS[option][0])
    return Case("model.preference_loss", f"{option} {value}", lambda place: kind(**{option: value}), says)


def constructed(entrance: str, arguments: tuple[Any, ...] = (), **more: Any) -> Any:
    def case(kind: Any, chosen: dict[str, Any], says: tuple[str, ...]) -> Case:
        fault = f"{kind.__name__} with {', '.join(f'{name} {value}' for name, value in chosen.items())}"
        return Case(entrance, fault, lambda place: kind(*arguments, **chosen, **more), says)

    return case


# Decided only with the data.


def routed(margins: list[float], **chosen: Any) -> Any:
    plan = {"hard_fraction": 0.5} | chosen
    return lambda place: Routing(**plan).plan(np.array(margins), np.arange(len(margins)), seed=0)


def generated(**chosen: Any) -> Any:
    return lambda place: generate(None, None, ["a"], **{"max_new_tokens": 4, "batch_size": 1, **chosen})


SCORES, OFFSETS = np.array([0.5, NAN, 1.0]), np.array([0, 1, 3])


def fit_case(entrance: str, fault: str, says: tuple[str, ...], how: str = "fit", **chosen: Any) -> Case:
    def do(place: Place) -> Any:
        return getattr(place, how)(**chosen)

    return Case(entrance, fault, do, says)


def rising(plan: Any) -> Any:
    return [1.0]


WITH_DATA = [
    Case("data.routing", "no pair", routed([]), ("no pair to route", "the training data is empty")),
    Case("data.routing", "a margin of NaN", routed([1.0, NAN]), ("margin 1 is not finite",)),
    Case("data.routing", "fewer pairs than buckets", routed([1.0, 2.0], order="bucketed"), ("trains 2 of", "needs 4")),
    Case(
        "data.slices",
        "more slices than samples",
        lambda place: plan_stages(2, Slices(3), batch_size=1),
        ("2 samples", "data.slices.count"),
    ),
    Case(
        "model.cleaning.selection",
        "a score of NaN",
        lambda place: select(SCORES, OFFSETS, Selection()),
        ("token 1 is nan", "check its losses"),
    ),
    Case(
        "model.cleaning.selection",
        "null, with negative scores",
        lambda place: weigh(None, np.array([-1.0]), OFFSETS[:2]),
        ("scores are weights",),
    ),
    Case("GoldEvaluation", "no new tokens", generated(max_new_tokens=0), ("max_new_tokens 0", "must be at least 1")),
    Case(
        "mixdpo options",
        "no such class",
        lambda place: options("mixdpo.losses.Nothing"),
        ("mixdpo.losses.Nothing", "give its whole path"),
    ),
    Case(
        "data.source",
        "a folder that is not there",
        lambda place: open_source("./no/folder", "train"),
        ("no/folder", "Check the path"),
    ),
    fit_case("model.schedule", "too few multipliers", ("must give 4 finite numbers",), schedule=rising),
    fit_case("trainer.limit_train_batches", "2", ("cuts the", "use data.limit"), trainer={"limit_train_batches": 2}),
    fit_case("trainer.max_epochs", "0", ("a schedule needs steps",), trainer={"max_epochs": 0}),
    fit_case(
        "data.max_prompt_length",
        "as max_length",
        ("max_length (64) must be", "above max_prompt_length (64)"),
        data={"max_prompt_length": 64},
    ),
    fit_case(
        "data.slices",
        "two epochs",
        ("set trainer.max_epochs 1",),
        "fit_sft",
        data={"slices": Slices(2)},
        trainer={"max_epochs": 2},
    ),
    fit_case(
        "model.cleaning",
        "no pair is hard",
        ("0 pairs are hard",),
        cleaning=Cleaning(),
        data={"routing": Routing(hard_fraction=0.0)},
    ),
    fit_case(
        "model.cleaning",
        "of rejected responses",
        ("hard_action must be sft (it is sft_both)",),
        cleaning=Cleaning(),
        data={"routing": Routing(hard_action="sft_both", hard_fraction=0.5)},
    ),
    fit_case(
        "model.cleaning",
        "no stage left",
        ("leaves no stage to clean",),
        "fit_sft",
        cleaning=Cleaning(scorer=Random(), warm_up_stages=1),
    ),
    fit_case(
        "model.cleaning",
        "a reference that is the base",
        ("every score would be 0", "Give model.cleaning.reference"),
        "fit_sft",
        cleaning=Cleaning(),
    ),
    fit_case(
        "model.cleaning.selection",
        "a token that is none",
        ("has no token 'nothing'",),
        "fit_sft",
        cleaning=Cleaning(scorer=Random(), selection=Selection(always_keep=["nothing"])),
    ),
    fit_case(
        "RefreshReference",
        "nothing to refresh",
        ("neither the scorer nor",),
        "fit_sft",
        trainer={"first": (RefreshReference(),)},
    ),
    fit_case(
        "RefreshReference",
        "one stage",
        ("the run has one stage", "data.routing.order"),
        trainer={"first": (RefreshReference(role="reference"),)},
        data={"routing": Routing(hard_fraction=0.0)},
    ),
    *(
        fit_case(type(kind).__name__, "in a planned run", (type(kind).__name__, says), trainer={"first": (kind,)})
        for kind, says in (
            (GradientAccumulationScheduler({0: 2}), "trainer.accumulate_grad_batches"),
            (LearningRateFinder(), "compare a few --model.optimizer.lr"),
            (BatchSizeFinder(), "set data.batch_size"),
        )
    ),
    fit_case(
        "model.preference_loss",
        "means over one pair",
        ("halve trainer.accumulate_grad_batches",),
        preference_loss=losses.KTOPair(),
        data={"batch_size": 2},
        trainer={"accumulate_grad_batches": 2},
    ),
]

CASES = [
    *(loss_case(*option) for option in OUT_OF_RANGE.items()),
    *(constructed("options")(*row) for row in CONSTRUCTED),
    *(constructed("module", ("unread",))(*row) for row in MODULES),
    *WITH_DATA,
]

"""Options out of range, misspelt, or impossible together."""

from typing import Any

import numpy as np
from lightning.pytorch import callbacks

from bad_input.case import Case, cases, parts
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
BATCH = Selection(scope="batch")
OUT_OF_RANGE = {
    "beta": 0, "label_smoothing": 0.5, "gamma_ratio": -1, "delta": -0.1, "nll_weight": -1, "odds_weight": -2,
    "length_penalty": -1, "drop_penalty": -1, "tail_weight": 1.1, "sensitivity": -1, "offset_weight": -1,
    "largest_factor": 1, "smallest_factor": 1, "steepness": -1, "neutral_margin": -1,
}  # fmt: skip
# class, options -> what is said
CONSTRUCTED: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
    (Routing, {"threshold": 0.5, "hard_fraction": 0.12}, ("give hard_fraction or threshold, not both (0.12 and 0.5)",)),
    (Routing, {"hard_fraction": 1.2}, ("routing.hard_fraction must lie in [0, 1], not be 1.2",)),
    (Routing, {"threshold": INF}, ("routing.threshold must be finite, not inf",)),
    (Routing, {"order": "sft_frist"}, ("routing.order must be one of", "not 'sft_frist'; did you mean 'sft_first'?")),
    (Routing, {"reshuffle": True}, ("needs the order shuffled or bucketed or paced, not easy_to_hard",)),
    (Routing, {"hard_action": "blend"}, ("hard_action blend needs a blend_width", "or hard_action sft")),
    (Routing, {"hard_action": "blend", "blend_width": 1.0, "assignment": "random"}, ("needs", "assignment margin")),
    (Routing, {"blend_width": NAN}, ("routing.blend_width must be >= 0 and blend_floor in [0, 0.5), not nan",)),
    (Slices, {"count": 3, "only": [2, 0]}, ("slices.only must name slices once, rising",)),
    (Selection, {"keep_ratio": 0.5, "threshold": 0.0}, ("selection: give keep_ratio or threshold,",)),
    (Selection, {"keep_ratio": 0.0}, ("selection.keep_ratio must lie in (0, 1]", "1 keeps every token")),
    (Selection, {"threshold": -INF}, ("selection.threshold must be finite",)),
    (Cleaning, {"scorer": len}, ("a role in `roles` of", "not None")),
    (Cleaning, {"scorer": Loss("policy"), "selection": Selection()}, ("reads the policy", "scope batch")),
    (Cleaning, {"scorer": Loss("policy"), "masks": "x", "selection": BATCH}, ("no cleaning.masks",)),
    (ExcessLoss, {"worse": "base", "better": "base"}, ("every score is 0", "name two roles")),
    (Cleaning, {"scorer": ExcessLoss(better="reference")}, ("must be one of base", "mean 'cleaning_reference'?")),
    (losses.DPO, {"beta": NAN}, ("preference_loss.beta must be > 0", "nan")),
    (losses.Sum, {"losses": [losses.DPO()], "weights": [1.0, 1.0]}, ("weights must be 1 numbers", "not [1.0, 1.0]")),
    (losses.Sum, {"losses": [losses.DPO()], "weights": [-1.0]}, ("numbers >= 0, not all 0, not [-1.0]",)),
    (losses.Sum, {"losses": [], "weights": []}, ("must be 0 numbers",)),
]
MODULES: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
    (PreferenceModule, {"cleaning": Cleaning(warm_up_stages=1)}, ("warm_up_stages belongs to SFT",)),
    (PreferenceModule, {"cleaning": Cleaning(Loss("policy"), BATCH)}, ("reads the policy", "name base, not policy")),
    (MarginModule, {"signal": ImplicitReward()}, ("model.adapter is None", "needs one")),
    (MarginModule, {"signal": RewardModel(), "adapter": "x"}, ("model.adapter is x", "needs none")),
]


def loss_case(option: str, value: float) -> Case:
    kinds = [kind for kind in vars(losses).values() if option in getattr(kind, "__dataclass_fields__", ())]
    kind = kinds[0] if kinds else losses.BetaDPO
    says = (f"preference_loss.{option} must be", HYPER_PARAMETERS[option][0])
    return Case("model.preference_loss", f"{option} {value}", lambda place: kind(**{option: value}), says)


def constructed(entrance: str, arguments: tuple[Any, ...] = (), **more: Any) -> Any:
    def case(kind: Any, chosen: dict[str, Any], says: tuple[str, ...]) -> Case:
        fault = f"{kind.__name__} with {', '.join(f'{name} {value}' for name, value in chosen.items())}"
        return Case(entrance, fault, lambda place: kind(*arguments, **chosen, **more), says)

    return case


def routed(margins: list[float], **chosen: Any) -> Any:
    plan = {"hard_fraction": 0.5} | chosen
    return lambda place: Routing(**plan).plan(np.array(margins), np.arange(len(margins)), seed=0)


def generated(**chosen: Any) -> Any:
    return lambda place: generate(None, None, ["a"], **{"max_new_tokens": 4, "batch_size": 1, **chosen})


SCORES, OFFSETS = np.array([0.5, NAN, 1.0]), np.array([0, 1, 3])
UNWEIGHED = {"batch": OFFSETS[:1], "always_keep": OFFSETS[:1]}
WITH_DATA = [
    *cases(
        "data.routing",
        ("a margin of NaN", routed([1.0, NAN]), "margin 1 (from 0) is not finite"),
        ("fewer pairs than buckets", routed([1.0, 2.0], order="bucketed"), "would train 2 of … needs at least 4"),
    ),
    *cases(
        "other options",
        ("more slices than samples", lambda _: plan_stages(2, Slices(3), batch_size=1), "2 samples … slices.count"),
        ("a score of NaN", lambda _: select(SCORES, OFFSETS, Selection()), "token 1 is nan … check the scorer"),
        ("a negative weight", lambda _: weigh(None, -SCORES[2:], OFFSETS[:2], **UNWEIGHED), "scores are weights"),
        ("no new tokens", generated(max_new_tokens=0), "max_new_tokens 0 … must be at least 1"),
        ("no such class", lambda _: options("mixdpo.losses.Nothing"), "mixdpo.losses.Nothing … give its whole path"),
        ("no such folder", lambda _: open_source("./no/folder", "train"), "no/folder … Check the path"),
    ),
]

# Decided only by a run: entrance, fault, what is said, options of a fit.

VALIDATED: dict[str, Any] = {"data": {"validation": 0.3}}


def rising(plan: Any) -> Any:
    return [1.0]


def data(**chosen: Any) -> dict[str, Any]:
    return {"data": chosen}


def trainer(*first: Any, **chosen: Any) -> dict[str, Any]:
    return {"trainer": {"first": first, **chosen}}


def cleaned(*scorer: Any, **chosen: Any) -> dict[str, Any]:
    return {"cleaning": Cleaning(*scorer, **chosen)}


def hard(fraction: float, **chosen: Any) -> dict[str, Any]:
    return data(routing=Routing(hard_fraction=fraction, **chosen))


BOTH = hard(0.5, hard_action="sft_both")
MOVING, NOTHING = RefreshReference(role="reference"), Selection(always_keep=["nothing"])
LOSS, SFT_LOSS = callbacks.EarlyStopping("val/loss"), callbacks.EarlyStopping("val/all/sft_loss")
ONE_PAIR = {"preference_loss": losses.KTOPair()} | data(batch_size=2) | trainer(accumulate_grad_batches=2)
CARD = {"preference_loss": losses.KTOPair()} | data(micro_batch_tokens="auto")
BOTH_CUT = data(micro_batch_tokens=100) | trainer(accumulate_grad_batches=2)
LONG_ROW = "row 8 of … pairs.jsonl has 34 tokens, a micro-batch 20 at most … data.micro_batch_tokens to 34 or more"
RANKED = cleaned(ExcessLoss(worse="policy"), Selection(0.5, scope="batch")) | data(micro_batch_tokens="auto")
STAY, STEPWISE = "scope is batch, data.routing.reshuffle false and no order paced", cleaned(Random(), BATCH)
FREE, EACH_STEP = {"preference_loss": losses.SimPO()}, RefreshReference(role="reference", every=1)
STACKED = cleaned() | trainer(RefreshReference(every=1, ema=0.5)) | {"stage_start": "fresh_adapter"}
WARM = "nothing makes the warmed-up policy the cleaning_reference"
OF_THEIR_OWN = [  # callbacks that would move the planned steps
    (callbacks.GradientAccumulationScheduler({0: 2}), "set data.batch_size"),
    (callbacks.LearningRateFinder(), "LearningRateFinder"),
    (callbacks.BatchSizeFinder(), "set data.batch_size"),
]
FITS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("model.schedule", "too few multipliers", "must give 4 finite numbers", {"schedule": rising}),
    ("trainer.limit_train_batches", "2", "cuts the … use data.limit", trainer(limit_train_batches=2)),
    ("trainer.max_epochs", "0", "a schedule needs a last step", trainer(max_epochs=0)),
    ("data.max_prompt_length", "as max_length", "must be above max_prompt_length", data(max_prompt_length=64)),
    ("model.cleaning", "no pair is hard", "0 pairs are hard", cleaned() | hard(0.0)),
    ("model.cleaning", "of rejected responses", "data.routing.hard_action sft", cleaned() | BOTH),
    ("RefreshReference", "one stage", "the run has one stage … data.routing.order", trainer(MOVING) | hard(0.0)),
    *(("trainer.callbacks", f"{i}", says, trainer(callback)) for i, (callback, says) in enumerate(OF_THEIR_OWN)),
    ("EarlyStopping", "SFT's name", "did you mean 'val/all/sft_loss' … train/loss", trainer(LOSS) | VALIDATED),
    ("EarlyStopping", "nothing held out", "a metric of this run: rewards/accuracy", trainer(SFT_LOSS)),
    ("model.preference_loss", "means over one pair", "halve trainer.accumulate_grad_batches", ONE_PAIR),
    ("model.preference_loss", "means of the card's", "KTOPair … give data.micro_batch_tokens a number", CARD),
    ("data.micro_batch_tokens", "and a number", "accumulate_grad_batches (now 2) to 1, or … null", BOTH_CUT),
    ("data.micro_batch_tokens", "fewer than a row's", LONG_ROW, data(micro_batch_tokens=20)),
    ("model.cleaning", "no pair is easy", "no easy pair", cleaned() | hard(1.0)),
    ("model.cleaning", "ranked in steps that change", STAY, STEPWISE | hard(0.25, order="shuffled", reshuffle=True)),
    ("model.cleaning", "ranked in steps that are drawn", STAY, STEPWISE | hard(0.25, order="paced")),
    ("RefreshReference", "a loss without one", "neither the scorer nor the loss reads a", FREE | trainer(EACH_STEP)),
]
SFT_FITS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("data.slices", "two epochs", "set trainer.max_epochs 1", data(slices=Slices(2)) | trainer(max_epochs=2)),
    ("model.cleaning", "no stage left", "leaves no stage to clean", cleaned(Random(), warm_up_stages=1)),
    ("model.cleaning", "a reference that is the base", "every score would be 0 … Give model.cleaning.", cleaned()),
    ("model.cleaning", "ranked in a card's batch", "set data.micro_batch_tokens to a number", RANKED),
    ("model.cleaning", "a warm-up of nobody", WARM, cleaned(warm_up_stages=1) | data(slices=Slices(2))),
    ("model.cleaning", "a token that is none", "has no token 'nothing'", cleaned(Random(), NOTHING)),
    ("RefreshReference", "an average of stages", "stacked adapters have no moving average: set ema to 0", STACKED),
    ("RefreshReference", "nothing to refresh", "neither the scorer nor", trainer(RefreshReference())),
    ("EarlyStopping", "a name of pairs", "'val/all/sft_loss' … did you mean 'val/loss'", trainer(SFT_LOSS) | VALIDATED),
]


def fit_case(how: str, entrance: str, fault: str, says: str, chosen: dict[str, Any]) -> Case:
    return Case(entrance, fault, lambda place: getattr(place, how)(**chosen), parts(says))


CASES = [
    *(loss_case(*option) for option in OUT_OF_RANGE.items()), *(constructed("options")(*row) for row in CONSTRUCTED),
    *(constructed("module", ("unread",))(*row) for row in MODULES), *WITH_DATA,
    *(fit_case("fit", *row) for row in FITS), *(fit_case("fit_sft", *row) for row in SFT_FITS),
]  # fmt: skip

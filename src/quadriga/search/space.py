"""Which recipes there are: legality by facts, one-step edits, and the same recipe at other training lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any

from quadriga.core.recipe import Recipe, Step, step

ADAMS = ("adam", "adamw", "nadam", "radam")
Card = Mapping[str, Any]  # a method's plain facts: name, family, numerics, search, shapes, requires, adds, removes, writes


@dataclass(frozen=True)
class Space:
    """The methods that may be used and the facts that hold at the start.

    Args:
        cards: by method name; one with an "unsearched" reason is never added to a recipe.
        traits: of the untouched setup.
        baseline: the recipe that trains the unchanged model; empty for a trained one.
        families: those that may be used.
        training: whether what training costs is the objective, so that every step decides the cost, but not its length.
    """

    cards: Mapping[str, Card]
    traits: frozenset[str]
    baseline: Recipe
    families: frozenset[str]
    training: bool = False

    def illegal(self, recipe: Recipe) -> str | None:
        """Why a recipe cannot be, by the facts that its steps require, add and remove; None if it can."""
        found = self._fault(recipe)
        return found and found[1]

    def mended(self, recipe: Recipe) -> Recipe | None:
        """The recipe without the steps that cannot be where they stand, since another one went; None if it is lost by that."""
        while found := self._fault(recipe):
            if recipe.steps[found[0]].is_train or found[0] < self.fixed(recipe):
                return None
            recipe = recipe.without(found[0])
        return recipe

    def _fault(self, recipe: Recipe) -> tuple[int, str] | None:
        """The first step that cannot be, and why."""
        traits, given = set(self.traits), self.fixed(recipe)
        for number, one in enumerate(recipe.steps):
            if one.is_train:
                if "TRAIN_DATA" not in traits:
                    return number, "train requires TRAIN_DATA"
                traits.add("TRAINED")
                continue
            card = self.cards.get(one.method)
            if card is None:
                return number, f"{one.method} is not known"
            if card["family"] not in self.families and number >= given:
                return number, f"{one.method} is of the family {card['family']}, which is not searched"
            if missing := sorted(set(card["requires"]) - traits):
                return number, f"{one.method} requires {', '.join(missing)}"
            traits = (traits - set(card["removes"])) | set(card["adds"])
        return None

    def fixed(self, recipe: Recipe) -> int:
        """How many leading steps are the baseline's own training, which stays as it is."""
        steps = self.baseline.steps
        return len(steps) if recipe.steps[: len(steps)] == steps else 0

    def lacking(self, recipe: Recipe) -> dict[int, str]:
        """Steps by number that need a fact which no method can bring about here, such as images; and the fact."""
        reachable = set(self.traits).union({"TRAINED"}, *(c["adds"] for c in self.cards.values()))
        found = {}
        for number, one in enumerate(recipe.steps):
            needed = () if one.is_train else self.cards.get(one.method, {}).get("requires", ())
            if missing := sorted(set(needed) - reachable):
                found[number] = missing[0]
        return found

    def adapt(self, recipe: Recipe) -> Recipe:
        """Leave out the steps that need a fact which no method can bring about here, and hardware where it is not searched."""
        without = self.lacking(recipe)
        if "hardware" not in self.families:
            without |= {i: "hardware" for i, s in enumerate(recipe.steps) if self._family(s) == "hardware"}
        return Recipe(tuple(s for i, s in enumerate(recipe.steps) if i not in without), recipe.name)

    def _family(self, one: Step) -> str:
        return str(self.cards.get(one.method, {}).get("family", ""))

    def tuned(self, recipe: Recipe) -> Recipe:
        """Where the recipe goes on from the baseline's training: by the baseline's own optimizer, if that is of Adam's kind.

        Its rate was chosen for this task; that of SGD is no rate to go on with from trained weights.
        """
        own = next((s for s in self.baseline.steps if s.method == "optimizer" and s.fields.get("kind") in ADAMS), None)
        if own is None or not self.fixed(recipe):
            return recipe
        first = self.fixed(recipe)
        steps = (own if s.method == "optimizer" and i >= first else s for i, s in enumerate(recipe.steps))
        return Recipe(tuple(steps), recipe.name)

    def complete(self, recipe: Recipe) -> Recipe:
        """Put the baseline's training in front of a recipe that starts from a trained model, or says that it does."""
        recipe = recipe.on(self.baseline)
        if "TRAINED" in self.traits or not self.baseline.steps or self.fixed(recipe):
            return recipe
        before = []
        for one in recipe.steps:
            if one.is_train:
                break
            before.append(one)
        needs = any("TRAINED" in self.cards[s.method]["requires"] for s in before if s.method in self.cards)
        if needs or len(before) == len(recipe.steps):
            return Recipe((*self.baseline.steps, *recipe.steps), recipe.name)
        return recipe

    def cost_part(self, recipe: Recipe) -> Recipe:
        """The steps that decide latency and bytes; recipes that share them share one cost probe.

        A train step is kept as a mark where a step needs TRAINED or may cut in the course of training; the baseline's training
        is kept whole before a change of the network, which may go by the weights.
        """
        first = self.fixed(recipe)
        if self.training:
            own = [s for s in recipe.steps[first:] if s.is_train]
            return recipe if len(own) > 1 else self._without_length(recipe, first)
        kept = [s for s in recipe.steps[first:] if s.is_train or self._costs(s)]
        plain = [step("train") if s.is_train else s for s in kept]
        if first and any(self.cards.get(s.method, {}).get("family") == "structure" for s in kept):
            return Recipe((*recipe.steps[:first], *self._marked(plain)))
        return Recipe(tuple(self._marked([*([step("train")] if first else []), *plain])))

    @staticmethod
    def _without_length(recipe: Recipe, first: int) -> Recipe:
        steps = (Step("train") if s.is_train and i >= first else s for i, s in enumerate(recipe.steps))
        return Recipe(tuple(steps))

    def _marked(self, plain: list[Step]) -> list[Step]:
        """Without repeated marks of training, and without any where no step waits for one."""
        single = [s for i, s in enumerate(plain) if not (s.is_train and i and plain[i - 1].is_train)]
        needed = any(self._waits(self.cards.get(s.method, {})) for s in single)
        return [s for s in single if needed or not s.is_train]

    def _costs(self, one: Step) -> bool:
        card = self.cards.get(one.method, {})
        return card.get("family") in ("structure", "hardware") and card.get("shapes", True)

    @staticmethod
    def _waits(card: Card) -> bool:
        """Whether a method needs a train step before it, may act in the course of the next one, or may go by the weights."""
        return "TRAINED" in card.get("requires", ()) or card.get("family") == "structure"

    def edits(self, recipe: Recipe) -> Iterator[Recipe]:
        """All recipes one step away: a field at a neighbouring choice, a step dropped, a method added, the other start."""
        first = self.fixed(recipe)
        yield from self._starts(recipe, first)
        for index, one in enumerate(recipe.steps[first:], first):
            if one.is_train:
                for changed in self._lengths(one):
                    yield self._named(recipe.replaced(index, changed), "trained for another time")
                continue
            for changed in self._neighbours(one):
                yield self._named(recipe.replaced(index, changed), f"{one.method} changed")
            yield self._named(recipe.without(index), f"without {one.method}")
        idle = not any(s.is_train for s in recipe.steps[first:])
        out = {n for n, card in self.cards.items() if card.get("unsearched") or (idle and self._only_trains(card))}
        left_out = {s.method for s in recipe.steps} | out
        for name in self._in_turn(set(self.cards) - left_out):
            for fields in _starts(self.cards[name]):
                yield self._insert(recipe, Step(name, fields), self.cards[name], first)

    @staticmethod
    def _only_trains(card: Card) -> bool:
        """Whether a method does nothing where no train step follows."""
        return card["family"] in ("training", "optimizer") or not card["shapes"]

    def _lengths(self, one: Step) -> Iterator[Step]:
        """A train step three quarters and four thirds as long, where its length is part of what is searched."""
        for factor in (0.75, 4 / 3) if self.training else ():
            yield Step("train", {**one.fields, "epochs": float(f"{one.fields.get('epochs', 10) * factor:.3g}")})

    def _starts(self, recipe: Recipe, first: int) -> Iterator[Recipe]:
        """A recipe that changes the network and trains it: from fresh weights where it starts from trained ones, or else so."""
        rest = recipe.steps[first:]
        cards = [self.cards[s.method] for s in rest if not s.is_train]
        if any(s.is_train for s in rest) and any(c["family"] == "structure" and c.get("shapes", True) for c in cards):
            if first:
                yield self._named(Recipe(rest, recipe.name), "from fresh weights")
            elif self.baseline.steps and "TRAINED" not in self.traits:
                yield self._named(Recipe((*self.baseline.steps, *rest), recipe.name), "from the trained baseline")

    def _in_turn(self, names: Iterable[str]) -> list[str]:
        """Methods of the searched families, one of each family in turn, so that a large family does not hide a small one."""
        queues = [[n for n in sorted(names) if self.cards[n]["family"] == family] for family in sorted(self.families)]
        return [name for turn in zip_longest(*queues) for name in turn if name is not None]

    def _neighbours(self, one: Step) -> Iterator[Step]:
        for field, choices in self.cards[one.method]["search"].items():
            now = one.fields.get(field, self.cards[one.method]["fields"].get(field))
            places = [i for i, c in enumerate(choices) if c == now]
            near = {places[0] - 1, places[0] + 1} if places and _ordered(choices) else set(range(len(choices)))
            for place in sorted(near):
                if 0 <= place < len(choices) and choices[place] != now:
                    yield Step(one.method, {**one.fields, field: choices[place]})

    def _insert(self, recipe: Recipe, new: Step, card: Card, first: int) -> Recipe:
        trains = [i for i, s in enumerate(recipe.steps) if s.is_train and i >= first]
        late = card["family"] == "hardware" and not card["trains"]
        if late:
            runtimes = [i for i, s in enumerate(recipe.steps) if i > max(trains, default=first - 1)]
            place = runtimes[0] if runtimes else len(recipe.steps)
        else:
            place = trains[0] if trains else first
        return self._named(Recipe((*recipe.steps[:place], new, *recipe.steps[place:]), recipe.name), f"with {new.method}")

    @staticmethod
    def _named(recipe: Recipe, change: str) -> Recipe:
        base = recipe.name.split(" · ")[0]
        return replace(recipe, name=f"{base} · {change}")


def _starts(card: Card) -> list[dict[str, Any]]:
    """The fields that a new step begins with: the first choices; where those are the defaults, one field changed at a time."""
    start = {field: choices[0] for field, choices in card["search"].items()}
    if not start or any(value != card["fields"].get(field) for field, value in start.items()):
        return [start]
    changed = [{**start, field: choices[1]} for field, choices in card["search"].items() if len(choices) > 1]
    return [start, *changed]


def _ordered(choices: Iterable[Any]) -> bool:
    values = list(choices)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return numbers and (values == sorted(values) or values == sorted(values, reverse=True))


def trained_epochs(recipe: Recipe) -> float:
    """Epochs over all train steps."""
    return sum(s.fields.get("epochs", 10) for s in recipe.steps if s.is_train)


def at_rung(recipe: Recipe, rungs: tuple[float, ...], rung: int, fixed: int = 0) -> Recipe:
    """The recipe at a training length, always decayed, so that lengths compare.

    With a WSD schedule and one train step, the stable phase is a chain of segments shared between rungs, and
    each rung ends in its own short decay. Otherwise every train step after the first `fixed` steps is scaled.

    Args:
        recipe: the template.
        rungs: total epochs of each rung, rising.
        rung: index into rungs.
        fixed: leading steps that stay as they are (the baseline's training).

    Example:
        >>> template = Recipe((step("schedule", kind="wsd", decay=0.5), step("train", epochs=8)))
        >>> print(at_rung(template, (2.0, 4.0), 1))
        schedule(kind=constant, warmup=0.0) → train(epochs=1.0) → train(epochs=1.0, continue=True) → \
schedule(kind=linear) → train(epochs=2.0, continue=True)
    """
    trains = [i for i, s in enumerate(recipe.steps) if s.is_train and i >= fixed]
    if not trains:
        return recipe
    before = recipe.steps[fixed : trains[0]]
    wsd = [s for s in before if s.method == "schedule" and s.fields.get("kind") == "wsd"]
    if len(trains) == 1 and len(wsd) == 1:
        return _branch(recipe, trains[0], wsd[0], rungs, rung)
    total = sum(recipe.steps[i].fields.get("epochs", 10) for i in trains)
    for i in trains:
        old = recipe.steps[i]
        epochs = round(old.fields.get("epochs", 10) * rungs[rung] / total, 4)
        recipe = recipe.replaced(i, Step("train", {**old.fields, "epochs": epochs}))
    return recipe


def _branch(recipe: Recipe, at: int, wsd: Step, rungs: tuple[float, ...], rung: int) -> Recipe:
    decay = wsd.fields.get("decay", 0.3)
    stable = step("schedule", kind="constant", warmup=wsd.fields.get("warmup", 0.0))
    lengths = [rungs[0], *(b - a for a, b in pairwise(rungs[: rung + 1]))]
    segments = [step("train", epochs=round(lengths[0] * (1 - decay), 4))]
    segments += [step("train", epochs=round(x * (1 - decay), 4), continue_=True) for x in lengths[1:]]
    tail = [step("schedule", kind="linear"), step("train", epochs=round(rungs[rung] * decay, 4), continue_=True)]
    head = [stable if s is wsd else s for s in recipe.steps[:at]]
    return Recipe((*head, *segments, *tail, *recipe.steps[at + 1 :]), recipe.name)

"""New candidates: fields by Optuna's TPE, told of every trial, and one-step edits of the best recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from quadriga.core.recipe import Recipe, Step
from quadriga.search.space import Space


class Proposer:
    """Proposes recipes near those that do well.

    The Optuna studies live in memory and are rebuilt from the trials each time with `add_trial`, so that a
    resumed search proposes from all that is known.

    Args:
        space: legality and edits.
        seed: of the sampler.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self._edited: dict[str, list[Recipe]] = {}

    def edit(self, recipe: Recipe, known: set[str]) -> Recipe | None:
        """The next legal one-step edit of a recipe that is not known yet; None when there is none."""
        if recipe.hash not in self._edited:
            self._edited[recipe.hash] = [r for r in self.space.edits(recipe) if self.space.illegal(r) is None]
        rest = self._edited[recipe.hash]
        while rest:
            new = rest.pop(0)
            if new.hash not in known:
                return new
        return None

    def fields(self, recipe: Recipe, told: Sequence[tuple[Recipe, float]], known: set[str]) -> Recipe | None:
        """The recipe with its searched fields as TPE proposes, given (recipe, utility) of the same methods.

        Source: Bergstra et al. 2011, "Algorithms for hyper-parameter optimization", as in Optuna.
        """
        import optuna

        choices = self._choices(recipe)
        if not choices:
            return None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {k: optuna.distributions.CategoricalDistribution([json.dumps(c) for c in v]) for k, v in choices.items()}
        sampler = optuna.samplers.TPESampler(seed=self.seed + len(told), n_startup_trials=4)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for other, utility in told:
            parameters = self._parameters(other, recipe, choices)
            if parameters is not None:
                study.add_trial(optuna.create_trial(params=parameters, distributions=kinds, value=utility))
        for _ in range(20):
            new = self._with(recipe, study.ask(kinds).params)
            if new.hash not in known and self.space.illegal(new) is None:
                return new
        return None

    def _choices(self, recipe: Recipe) -> dict[str, list[Any]]:
        first = self.space.fixed(recipe)
        found: dict[str, list[Any]] = {}
        for index, one in enumerate(recipe.steps):
            if one.is_train or index < first:
                continue
            for name, options in self.space.cards[one.method]["search"].items():
                now = one.fields.get(name, self.space.cards[one.method]["fields"].get(name))
                found[f"{index}.{name}"] = list(options) + ([now] if now not in options else [])
        return found

    @staticmethod
    def _parameters(other: Recipe, like: Recipe, choices: dict[str, list[Any]]) -> dict[str, str] | None:
        if [s.method for s in other.steps] != [s.method for s in like.steps]:
            return None
        parameters = {}
        for key, options in choices.items():
            index, name = key.split(".")
            value = other.steps[int(index)].fields.get(name, like.steps[int(index)].fields.get(name))
            if value not in options:
                return None
            parameters[key] = json.dumps(value)
        return parameters

    @staticmethod
    def _with(recipe: Recipe, parameters: dict[str, str]) -> Recipe:
        steps = list(recipe.steps)
        for key, text in parameters.items():
            index, name = key.split(".")
            old = steps[int(index)]
            steps[int(index)] = Step(old.method, {**old.fields, name: json.loads(text)})
        return Recipe(tuple(steps), recipe.name.split(" · ")[0] + " · fields")

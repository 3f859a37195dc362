"""Choose the sources whose rows are shown: those of a mix that have the part, or one; else the run's data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from trainers.config.errors import ConfigError
from trainers.config.mix import Source, source_named, value_sources
from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings
from trainers.data.loading import Part
from trainers.data.mixing import sources_with
from trainers.data.prepare import parts


@dataclass(frozen=True)
class ShownSource:
    """A source whose rows are shown."""

    config: TrainConfig  # of a run that has only this source
    values_from: Mapping[str, str]  # field -> where its value is from
    of_mix: Source | None = None

    @property
    def name(self) -> str:
        """The name in the mix, or an empty string."""
        return self.of_mix.name if self.of_mix else ""

    def named(self) -> AbstractContextManager[None]:
        """Name the source in a ConfigError that the block raises."""
        return self.of_mix.named() if self.of_mix else nullcontext()


def choose_sources(settings: Settings, part: Part, name: str | None = None) -> list[ShownSource]:
    """Return the sources that have the part, or only the one that `--source` names.

    Raises:
        ConfigError: there is no such part, or no such source.
    """
    config = settings.train
    only = None if name is None else source_named(config, name)
    if part not in parts(config):
        raise ConfigError(
            f"--split: the config has no {part} part. Set data.{part}_split or data.{part}_fraction, or give "
            f"--split {' or '.join(parts(config))}."
        )
    if config.mix is None:
        return [ShownSource(config, settings.sources)]
    found = sources_with(config, part)
    if only is not None and only not in found:
        has = [other for other in parts(config) if only in sources_with(config, other)]
        raise ConfigError(
            f"--source: {only.name} has no {part} part. Give --split {' or '.join(has)}, or one of these "
            f"sources: {', '.join(source.name for source in found)}."
        )
    return [
        ShownSource(source.config, value_sources(config, source, settings.sources), source)
        for source in found
        if only in (None, source)
    ]

"""Base models as their cards on the Hub describe them, and the licence that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratools.errors import UploadError
from loratools.hub.client import hub_api, persistently
from loratools.hub.failures import hub_errors
from loratools.publishing.words import PERMISSIVE


@dataclass(frozen=True, slots=True)
class BaseCard:
    """What the Hub knows of a base model.

    Attributes:
        repo: ``OWNER/NAME``.
        found: whether it is there, and visible to the user.
        license: the Hub's identifier, or ``None`` if its card has none.
        license_name: its name, where ``license`` is ``other``.
        license_link: where its text is.
        pipeline_tag: its task.
    """

    repo: str
    found: bool = True
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None

    @property
    def terms(self) -> str | None:
        """The licence in one word: its name where the identifier is ``other``."""
        return self.license_name or self.license if self.license == "other" else self.license


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence as a card states it; ``note`` says where it comes from."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    note: str | None = None


def look_up_base(repo: str) -> BaseCard:
    """Ask the Hub for a base model's card; raises HubError if there is no answer."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(repo):
        try:
            found: Any = persistently(lambda: hub_api().model_info(repo))
        except RepositoryNotFoundError:
            return BaseCard(repo, found=False)
    data = found.card_data.to_dict() if found.card_data else {}
    licence = data.get("license")
    return BaseCard(
        repo,
        license=licence[0] if isinstance(licence, list) and licence else licence or None,
        license_name=data.get("license_name"),
        license_link=data.get("license_link"),
        pipeline_tag=found.pipeline_tag,
    )


def settle_licence(stated: str | None, bases: Sequence[BaseCard], *, allowed: bool) -> Licence:
    """Return the licence of what is derived from ``bases``.

    Args:
        stated: what the user, the card or the file says; ``None`` to inherit.
        bases: the base models' cards.
        allowed: the user answers for a conflict.

    Raises:
        UploadError: the stated licence is not that of a base whose licence binds what is derived
            from it, or two bases bind to different ones.
    """
    binding = {b.terms: b for b in bases if b.license and b.license not in PERMISSIVE}
    if len(binding) > 1 and not allowed:
        words = " and ".join(f"{base.repo} is under {terms}" for terms, base in binding.items())
        raise UploadError(
            f"the base models' licences differ: {words}",
            hint="see which of them allow both; then --license ID --allow-conflict",
        )
    bound = next(iter(binding.values()), None)
    if bound and stated not in (None, bound.license, bound.terms) and not allowed:
        raise UploadError(
            f"the licence {stated} conflicts with {bound.terms}, that of {bound.repo}, which "
            "binds what is derived from it",
            hint=f"leave --license out or say --license {bound.license}; --allow-conflict if its "
            "owner allows another",
        )
    if stated and (bound is None or stated != bound.license):
        return Licence(stated)
    source = bound or next((base for base in bases if base.license), None)
    if source is None:
        return Licence(note=_none_known(bases))
    note = f"licence {source.terms}: inherited from {source.repo}"
    return Licence(source.license, source.license_name, source.license_link, note)


def _none_known(bases: Sequence[BaseCard]) -> str:
    names = ", ".join(base.repo for base in bases)
    return f"no licence: {names} states none; --license sets one"

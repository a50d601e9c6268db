"""Data as a card tells of it: its licence, and what that asks of the weights. CIFAR-10 and CelebA are filled in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """Of the weights. `id` is the Hub's abbreviation; name and link go with "other"."""

    id: str
    text: str  # one sentence or phrase for the card
    name: str | None = None
    link: str | None = None

    @property
    def plain(self) -> str:
        """The text for a terminal, without Markdown's emphasis."""
        return self.text.replace("*", "")

    @property
    def named(self) -> dict[str, str | None]:
        """As cards and the weights' own files name it."""
        return {"id": self.id, "name": self.name, "link": self.link}


@dataclass(frozen=True)
class Data:
    name: str
    licence: str  # of the pictures, or whose they are, in a few words
    citation: str | None = None
    hub_id: str | None = None
    weights: Licence | None = None  # the only one that weights trained on it can have; None: their author's choice
    people: bool = False  # pictures of people who were not asked: none is shown
    limits: str | None = None


KNOWN = {
    "cifar10": Data(
        name="CIFAR-10",
        citation="Krizhevsky, 2009",
        licence="the page of CIFAR-10 names no licence for the images",
        hub_id="uoft-cs/cifar10",
    ),
    "celeba": Data(
        name="CelebA",
        citation="Liu et al., 2015",
        licence="CelebA is for non-commercial research only, and its pictures are not to be distributed further",
        hub_id="flwrlabs/celeba",
        weights=Licence(
            id="other",
            text="for **non-commercial research** only, as CelebA asks of what is made from it",
            name="celeba-non-commercial-research",
            link="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        ),
        people=True,
        limits="It has seen aligned portraits of celebrities: other framings, and people unlike those, turn out worse.",
    ),
}

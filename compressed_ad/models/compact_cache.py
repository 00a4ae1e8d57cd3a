"""A key-value cache that tokens leave which nothing will see again: a step costs the same at any length."""

from __future__ import annotations

import torch
from torch import Tensor

from compressed_ad.models.segments import NEVER, SegmentEvents, Values, events
from compressed_ad.models.settings import Architecture, TokenInputName
from compressed_ad.models.token_inputs import TOKEN_INPUT
from compressed_ad.models.tokens import Tokens
from compressed_ad.models.transformer import Cache, Transformer

_RUNNING: tuple[TokenInputName, ...] = ("episode_return", "episode_time")


class CompactCache(Cache):
    """The visible tokens of each context, under the same rule as ``segments.visible_until``.

    Keys are turned by their place in the whole history, so tokens can move closer together without being
    computed again. Dead tokens are removed when a row is full; if none is, the cache grows.
    """

    def __init__(self, transformer: Transformer, n_row: int, config: Architecture) -> None:
        self.config = config
        super().__init__(transformer, n_row)
        slots, device = (n_row, self.key.shape[3]), self.key.device
        self.place = torch.zeros(n_row, dtype=torch.long, device=device)
        """(B,) tokens of the whole history so far."""
        self.at = torch.zeros(slots, dtype=torch.long, device=device)
        """(B, T) place of the token in each entry."""
        self.until = torch.full(slots, NEVER, device=device)
        """(B, T) last query that may see it, as far as events tell."""
        self.stays = torch.zeros(slots, dtype=torch.bool, device=device)
        """(B, T) whether it outlives its segment, which may still be open."""
        self.now: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def capacity(self, transformer: Transformer) -> int:
        most = self.config.kept_tokens + self.config.n_transit
        return min(most, self.config.kept_tokens + max(32, 2 * self.config.recent_steps))

    def admit(self, tokens: Tokens) -> SegmentEvents | None:
        """Make room for the next token of each row, (B, 1), and let go what leaves with it."""
        self.last = {name: value.clone() for name, value in self.now.items()}
        token = {name: value[:, 0] for name, value in vars(tokens).items() if value is not None}
        self.now = {name: TOKEN_INPUT[name].following(token, self.last) for name in _RUNNING}
        found = events(self.config, self._shown(token))
        if found is not None:
            self._let_go(found)
        if int(self.length.max()) == self.key.shape[3]:
            self._make_room()
        entry = self.entry
        row = torch.arange(len(entry), device=entry.device)
        self.at[row, entry] = self.place
        self.until[row, entry] = NEVER
        self.stays[row, entry] = False if found is None else found.keeps
        if found is not None:
            used = torch.arange(self.key.shape[3], device=entry.device) <= entry[:, None]
            newer = (self.stays & used).flip(1).long().cumsum(dim=1).flip(1) - 1
            old = self.stays & used & (newer >= self.config.kept_tokens) & (self.until == NEVER)
            self.until = torch.where(old, self.place[:, None], self.until)
        return found

    def _shown(self, token: Values) -> Values:
        """What rules may read of the tokens (B,)."""
        total = self.last.get("episode_return", torch.zeros_like(self.now["episode_return"]))
        return {
            **token,
            "episode_return": total + token["reward"],
            "episode_time": self.now["episode_time"],
            "place": self.place,
        }

    def _let_go(self, found: SegmentEvents) -> None:
        """End the open segments of the rows in which one ends."""
        used = torch.arange(self.key.shape[3], device=self.key.device) < self.entry[:, None]
        inside = used & ~self.stays & (self.until == NEVER)
        closed = inside & found.closes[:, None]
        leaves = self.place[:, None] - (0 if self.config.segment_gist else 1)
        self.until = torch.where(closed, leaves, self.until)
        self.stays |= inside & (found.opens & ~found.closes)[:, None]

    def dead(self) -> Tensor:
        """(B, T) entries that the next token must not see."""
        until = self.until.minimum(self.at + self.config.n_transit - 1)
        if self.config.segmentation == "none":
            until = torch.zeros_like(until)
        return until.maximum(self.at + self.config.recent_steps - 1) < self.place[:, None]

    def _make_room(self) -> None:
        """Move what is visible to the front of all rows; double the entries if a row is still full."""
        size = self.key.shape[3]
        alive = (torch.arange(size, device=self.key.device) < self.entry[:, None]) & ~self.dead()
        order = torch.argsort((~alive).to(torch.uint8), dim=1, stable=True)
        self.length = alive.sum(dim=1).cpu()
        most = int(self.length.max())
        order = order[:, :most]
        wide = order[None, :, None, :, None].expand(*self.key.shape[:3], most, self.key.shape[4])
        for store in (self.key, self.value):
            store[:, :, :, :most] = store.gather(3, wide)
        for name in ("at", "until", "stays"):
            values = getattr(self, name)
            values[:, :most] = values.gather(1, order)
        if most > size // 2:
            for name in ("key", "value"):
                store = getattr(self, name)
                setattr(self, name, torch.cat([store, torch.zeros_like(store)], dim=3))
            for name, blank in (("at", 0), ("until", NEVER), ("stays", False)):
                values = getattr(self, name)
                setattr(self, name, torch.cat([values, torch.full_like(values, blank)], dim=1))

    def rotation(self, transformer: Transformer) -> tuple[Tensor, Tensor]:
        angle = self.place[:, None].double() * transformer.frequency.double()
        return angle.cos().float(), angle.sin().float()

    def advance(self) -> None:
        super().advance()
        self.place = self.place + 1

    def forget(self, rows: Tensor) -> None:
        some = rows & (self.length > 0)
        super().forget(rows)
        some = some.to(self.place.device)
        self.place = self.place - some.long()
        for name, value in self.last.items():
            self.now[name] = torch.where(some, value, self.now[name])

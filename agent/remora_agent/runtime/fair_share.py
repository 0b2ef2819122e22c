"""Who has had how much: a virtual time for each client, in tokens. Pure.

The client with the least virtual time goes first. A request is charged the most that it may take
when it gets its row, and what it did not take is given back when it ends, so of two clients that
always have requests waiting, neither gets ahead of the other by more than (rows + 1) times the
largest request. A client that comes back from a pause starts where the least of the active ones
stands: a pause earns nothing.

`NestedShare` is fair twice: between owners (who is connected), and within one between the clients
that it names. Names are free to choose, so they never reach beyond their owner's part.
"""

from __future__ import annotations

from collections import Counter

MAX_REMEMBERED = 1024  # clients without a request whose time is kept


class FairShare:
    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._active: Counter[str] = Counter()  # requests waiting or running, by client

    @property
    def idle(self) -> bool:
        return not self._active

    def start(self, client: str) -> float:
        """The client's virtual time, if a request of it were here."""
        own = self._times.get(client, 0.0)
        return own if client in self._active else max(own, self._least())

    def enter(self, client: str) -> None:
        """One more request of the client is here."""
        if not self._active:
            self._times.clear()
        self._times[client] = self.start(client)
        self._active[client] += 1
        self._forget()

    def leave(self, client: str) -> None:
        self._active[client] -= 1
        if not self._active[client]:
            del self._active[client]

    def charge(self, client: str, tokens: float) -> None:
        """Negative: gives back."""
        self._times[client] = self._times.get(client, 0.0) + tokens

    def _least(self) -> float:
        return min((self._times.get(c, 0.0) for c in self._active), default=0.0)

    def _forget(self) -> None:
        """Those who would start no later than the others anyway; then the least of the rest."""
        if len(self._times) <= MAX_REMEMBERED + len(self._active):
            return
        least = self._least()
        idle = {c: t for c, t in self._times.items() if c not in self._active and t > least}
        kept = sorted(idle, key=idle.__getitem__)[-MAX_REMEMBERED // 2 :]
        names = {*kept, *self._active}
        self._times = {c: t for c, t in self._times.items() if c in names}


class NestedShare:
    def __init__(self) -> None:
        self._owners = FairShare()
        self._within: dict[str, FairShare] = {}  # of owners with a request here

    def owner_start(self, owner: str) -> float:
        return self._owners.start(owner)

    def client_start(self, owner: str, client: str) -> float:
        """Comparable among clients of one owner only."""
        within = self._within.get(owner)
        return 0.0 if within is None else within.start(client)

    def enter(self, owner: str, client: str) -> None:
        self._owners.enter(owner)
        self._within.setdefault(owner, FairShare()).enter(client)

    def leave(self, owner: str, client: str) -> None:
        self._owners.leave(owner)
        self._within[owner].leave(client)
        if self._within[owner].idle:
            del self._within[owner]

    def charge(self, owner: str, client: str, tokens: float) -> None:
        """Of a client with a request here."""
        self._owners.charge(owner, tokens)
        self._within[owner].charge(client, tokens)

"""What was served before: the way that a rollback goes back along."""

from dataclasses import dataclass

from sf_pipelines.snapshot.errors import OperationError, RunNotFoundError
from sf_pipelines.snapshot.manifest.pointer import MAX_REMEMBERED, Pointer, manifest_key
from sf_pipelines.snapshot.manifest.publish import HistoryEntry
from sf_pipelines.snapshot.store import Store


@dataclass(frozen=True)
class Trail:
    """Published snapshots in the order in which they were served.

    Attributes:
        pointer: the current pointer; None where there is none.
        entries: everything that is listed, oldest first.
        served: what was served and is still listed, oldest first, the current one last if it is listed.
    """

    pointer: Pointer | None
    entries: tuple[HistoryEntry, ...]
    served: tuple[HistoryEntry, ...]

    @classmethod
    def of(cls, pointer: Pointer | None, entries: list[HistoryEntry]) -> "Trail":
        """From the pointer and the whole history.

        The pointer remembers the last runs that were served. What is listed from before, or all where a writer moved
        the pointer that remembers nothing, is taken in the order of the manifests' dates.
        """
        listed = tuple(sorted(entries, key=lambda entry: entry.manifest_key))
        if pointer is None:
            return cls(None, listed, ())
        newest = {entry.run_id: entry for entry in listed}
        known = pointer.served if pointer.served[-1:] == (pointer.run_id,) else (pointer.run_id,)
        remembered = [newest[run_id] for run_id in known if run_id in newest and run_id not in pointer.withdrawn]
        first = remembered[0].manifest_key if remembered else manifest_key(pointer)
        skipped = {*known, *pointer.withdrawn}
        before = [entry for entry in listed if entry.manifest_key < first and entry.run_id not in skipped]
        return cls(pointer, listed, (*before, *remembered))

    def find(self, run_id: str, store: Store) -> HistoryEntry:
        """The published snapshot of a run.

        Raises:
            RunNotFoundError: none is listed.
        """
        for entry in reversed(self.entries):
            if entry.run_id == run_id:
                return entry
        known = ", ".join(entry.run_id for entry in self.entries[-5:]) or "none"
        raise RunNotFoundError(
            f"no snapshot of run {run_id!r} is published under {store.url} (the newest are: {known})"
        )

    def back(self, steps: int, store: Store) -> HistoryEntry:
        """What was served so many snapshots ago.

        Raises:
            OperationError: ``steps`` is no number of snapshots, or nothing is current.
            RunNotFoundError: so many are not there any more.
        """
        if isinstance(steps, bool) or steps < 1:
            raise OperationError(f"back must be a whole number of at least 1 (got {steps!r})")
        if self.pointer is None:
            raise OperationError(f"nothing is current under {store.url}, so there is no way back; name a run: to=…")
        before = [entry for entry in self.served if entry.run_id != self.pointer.run_id]
        if steps > len(before):
            raise RunNotFoundError(
                f"{store.url}: {len(before)} snapshots that were served before run {self.pointer.run_id!r} are still "
                f"there, {steps} were asked for"
            )
        return before[-steps]

    def withdrawn_by(self, target: HistoryEntry) -> tuple[str, ...]:
        """The pointer's list of withdrawn runs after a rollback: what comes after the target is withdrawn."""
        if self.pointer is None:
            return ()
        order = [entry.run_id for entry in self.served]
        # What was never served counts by its date: nobody should fall back to it from the target either.
        later = {entry.run_id for entry in self.entries if entry.manifest_key > target.manifest_key} - set(order)
        if target.run_id in order:
            later |= {*order[order.index(target.run_id) + 1 :], self.pointer.run_id}
        elif manifest_key(self.pointer) > target.manifest_key:
            later.add(self.pointer.run_id)
        # The current one may not be listed any more, which may be the very reason for the rollback.
        everyone = (*(entry.run_id for entry in self.entries), self.pointer.run_id)
        known = dict.fromkeys((*self.pointer.withdrawn, *(run_id for run_id in everyone if run_id in later)))
        return tuple(run_id for run_id in known if run_id != target.run_id)[-MAX_REMEMBERED:]

    def served_after(self, target: HistoryEntry) -> tuple[str, ...]:
        """The pointer's list of served runs after a rollback: what was served up to the target."""
        order = [entry.run_id for entry in self.served]
        if target.run_id in order:
            return tuple(order[: order.index(target.run_id) + 1])[-MAX_REMEMBERED:]
        withdrawn = set(self.withdrawn_by(target))
        return (*(run_id for run_id in order if run_id not in withdrawn), target.run_id)[-MAX_REMEMBERED:]

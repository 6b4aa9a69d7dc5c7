"""The memory that pipeline transport holds, counted: every tensor that a stage makes to receive into, hands to the process group,
or puts into its cache is followed by a weak reference to its storage. What two of them share counts once, and for as long as
anybody holds it: torch's lists of transfers, autograd, or the cache.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from attnres_compile import pipeline
from attnres_compile.pipelining import hops
from attnres_compile.pipelining.cache import BlockCache


class Held:
    """Follows what the transport makes, sends and keeps; ``peak`` and ``peak_in_transfers`` are bytes."""

    def __init__(self) -> None:
        self._storages: dict[StorageWeakRef, int] = {}
        self._transfers: weakref.WeakSet[hops.PendingTransfer] = weakref.WeakSet()
        self.peak = self.peak_in_transfers = 0

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        # Where tensors come to the transport, and which: of the arguments given, and of what the call made.
        places: tuple[tuple[Any, str, Callable[[tuple[Any, ...], Any], list[Tensor | None]]], ...] = (
            (pipeline, "empty_like", lambda given, made: [made]),
            (pipeline, "operations", lambda given, made: given[1]),
            (BlockCache, "put", lambda given, made: given[3:]),
            (BlockCache, "deposit", lambda given, made: given[4:]),
            (hops, "PendingTransfer", self._transfer),
        )
        with contextlib.ExitStack() as patches:
            for owner, name, tensors in places:
                patches.enter_context(mock.patch.object(owner, name, self._watching(getattr(owner, name), tensors)))
            yield

    def _transfer(self, given: tuple[Any, ...], made: hops.PendingTransfer) -> list[Tensor | None]:
        self._transfers.add(made)
        return [given[1]]

    def _watching(self, call: Callable[..., Any], tensors: Callable[[tuple[Any, ...], Any], Any]) -> Callable[..., Any]:
        def watched(*given: Any) -> Any:
            made = call(*given)
            for tensor in tensors(given, made):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    self._storages[StorageWeakRef(storage)] = storage.nbytes()
            self._measure()
            return made

        return watched

    def _measure(self) -> None:
        self._storages = {ref: nbytes for ref, nbytes in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._storages.values()))
        under_way = [transfer._tensor for transfer in self._transfers if transfer._tensor is not None]
        self.peak_in_transfers = max(self.peak_in_transfers, sum(tensor.nbytes for tensor in under_way))

    def left(self) -> int:
        """Bytes that are still held."""
        gc.collect()
        return sum(nbytes for ref, nbytes in self._storages.items() if not ref.expired())

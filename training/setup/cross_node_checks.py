"""What several machines tell each other before a run begins: that their data is there, that data and run are the
same, or that one of them has to give up.

Each may have a data folder of its own, and meet a mistake that the others do not have. One that just ended would leave
them waiting in the first exchange of training for as long as processes may keep each other waiting.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping

from common.cli_errors import InputError
from training.data.producing.background_producer import ProducerBeside
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.tokenization.tokenizer import Tokenizer

_SECONDS_BETWEEN_LOOKS = 0.3
_GIVEN_UP, _WAITING, _READY = range(3)  # a process's first shards; the smallest of all processes' counts
_IDS_COMPARED = 1 << 20  # of a shard that no manifest has a hash of


class Machines:
    """The processes of a run on several machines, as one of them sees them; on one machine it asks nobody.

    Args:
        least: returns the smallest of all processes' numbers; all of them call it equally often.
    """

    def __init__(self, least: Callable[[int], int]) -> None:
        several = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
        self._least = least if several else None
        self._listening = several

    @contextlib.contextmanager
    def told_of_mistakes(self) -> Iterator[None]:
        """Let an `InputError` of this process end the others too, at their next exchange."""
        try:
            yield
        except InputError:
            if self._listening:
                with contextlib.suppress(InputError):  # they do not even meet; ours came first
                    self._exchange(_GIVEN_UP)
            raise

    def wait_for(self, ready: Callable[[], bool], producer: ProducerBeside) -> None:
        """Wait until the shards that a run begins with are there, on every machine.

        A producer that fails when this machine's shards are there is no reason to end, as it is none in training.

        Raises:
            InputError: a producer ended for a reason that will not go away, or another process has given up.
        """
        while True:
            own = _READY if ready() else _GIVEN_UP if producer.hopeless else _WAITING
            state = self._exchange(own)
            if state == _READY:
                producer.training_begins()
                return
            if state == _GIVEN_UP:
                if own == _GIVEN_UP:
                    producer.check()
                raise _given_up()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def compare_data(self, folder: ShardFolder, tokenizer: Tokenizer) -> None:
        """Refuse to train on machines that have different data: nothing else would tell.

        Raises:
            InputError: they have, or another process has given up.
        """
        if here := self._differing(lambda: _of_data(folder, tokenizer)):
            raise InputError(
                f"expected the same data on every machine, found different ones (in {folder.path} here: {here}); "
                "prepare it once and copy the folder to every machine, or give a data_dir that they share"
            )

    def compare_runs(self, output_dir: str, known: Callable[[], Mapping[str, object]]) -> None:
        """Refuse to train where machines would take different steps, or begin with different weights.

        Args:
            output_dir: of the run.
            known: what decides on these.

        Raises:
            InputError: they would, or another process has given up.
        """
        if here := self._differing(known):
            raise InputError(
                f"expected the same run on every machine, found different ones (in {output_dir} here: {here}); give "
                "every machine the same recipe, flags and files, and an output_dir that they share, or a copy of all "
                "that is in it"
            )

    def _differing(self, known: Callable[[], Mapping[str, object]]) -> str:
        """Return what is known here and otherwise on another machine, in words."""
        if self._least is None:
            return ""
        facts = known()
        if not self._agree(list(facts)):
            self._listening = False
            raise InputError("expected the same version of this project on every machine, found different ones")
        if self._agree(facts):
            return ""
        differing = [f"{name} {value!s:.12}" for name, value in facts.items() if not self._agree([name, value])]
        self._listening = False  # all of them know
        return ", ".join(differing)

    def _agree(self, thing: object) -> bool:
        digest = hashlib.sha256(repr(thing).encode()).digest()
        number = int.from_bytes(digest[:8], "big") >> 2 | 1 << 61  # 62 bits, and none of the states
        smallest = self._exchange(number)
        if smallest == _GIVEN_UP:
            raise _given_up()
        return smallest == -self._exchange(-number)

    def _exchange(self, number: int) -> int:
        if self._least is None:
            return number
        self._listening = False  # should it fail, nobody is there to be told
        smallest = self._least(number)
        self._listening = smallest != _GIVEN_UP
        return smallest


def _given_up() -> InputError:
    return InputError(
        "another process of the run met a mistake and the run cannot begin; that one's error line says it"
    )


def _of_data(folder: ShardFolder, tokenizer: Tokenizer) -> dict[str, object]:
    """Return what decides on the ids and their order, as far as it is known when a run begins."""
    names = ("corpus_revision", "dtype", "shard_tokens", "max_tokens")
    return {
        "tokenizer": tokenizer.fingerprint,
        **{name.replace("_", " "): getattr(folder.manifest, name, None) for name in names},
        "validation shard": _content(folder.val_shard),
        "first training shard": _content(folder.train_shards[0]),
    }


def _content(shard: Shard) -> str:
    if shard.sha256 is not None:
        return shard.sha256
    return hashlib.sha256(f"{shard.tokens} ".encode() + shard.read()[:_IDS_COMPARED].tobytes()).hexdigest()

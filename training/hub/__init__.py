"""Publishing on the Hub.

`publisher.py` pushes while a run trains, `__main__.py` by hand, `shard_dataset.py` shards as a dataset. They stage a
folder (`staging.py`) with a card (`card.py`), which keeps people's edits (`card_edits.py`), and push it as one commit
(`repository.py`).
"""

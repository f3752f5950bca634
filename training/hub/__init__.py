"""Publishing: what goes to the Hub, when, and the page that stands there.

`publishing.py` decides during a run, `command.py` pushes by hand; both stage a folder (`staging.py`) with its page
(`card.py`, from what `facts.py` knows of the run) and push it as one commit (`repository.py`).
"""

"""The tests mirror the source; what several of them build lies in `tests/tiny.py`."""

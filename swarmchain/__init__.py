"""Hospitals train one single-cell model together, without sharing data and with no one in charge."""

__version__ = "0.1.0"

"""What controller and agent share: ids, keys, records, identity, store and errors. Knows neither side."""

__version__ = "0.1.0"

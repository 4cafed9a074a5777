"""The job: command lines, options, and the graph that joins the steps."""

__version__ = "0.1.0"

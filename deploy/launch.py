"""What the Flex Template's launcher runs: the job's main, from the folder that holds the packages.

Run as a script, `pipeline/extract.py` would put its own folder first on the path, whose `models.py`
is not the package `models`.
"""

from pipeline.extract import main, run_process

if __name__ == "__main__":
    run_process(main)

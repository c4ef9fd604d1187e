"""The verbs of `fundamentallm VERB` besides `train`, one file each with a `main(arguments, program) -> exit code`.

What they share, and what one file would be too long for, lies in files without a `main`.
"""

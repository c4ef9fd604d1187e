"""The verbs of `fundamentallm VERB` besides `train`, one file each with a `main(arguments, program) -> exit code`."""

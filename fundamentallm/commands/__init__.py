"""The commands of `fundamentallm COMMAND` besides `train`, each with a `main(arguments, program) -> exit code`."""

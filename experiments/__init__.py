"""What backs a claim about the method: ``python -m experiments`` lists them. Imported by nothing."""

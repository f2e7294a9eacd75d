"""Recipes: named steps of the command line's verbs, checked whole, then run in order.

Nothing here knows the commands themselves; ``Verb`` says what a recipe must know of one.
"""

"""Agreement with PEFT, run side by side on models small enough to build in a moment."""

"""Figures of spectra and alignments: one PNG, SVG or self-contained HTML file each."""

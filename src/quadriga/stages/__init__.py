"""The stations of a study, in order: baseline, explore, ablate, conclude. The composer is `quadriga.study`."""

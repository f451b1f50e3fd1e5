"""`mixerzoo refit`: a student of a run, refitted site by site in closed form."""

"""Everything that runs inside a hospital: the site's commands, its policy, and the one door for all that leaves."""

"""Everything that runs inside a hospital: the site's commands, its policy, and the one door through which anything leaves."""

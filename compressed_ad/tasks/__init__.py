"""Task families: sets of MDPs that share spaces and horizon. Importing this registers the built-in ones."""

from compressed_ad.tasks import bandit as bandit
from compressed_ad.tasks import gridworld as gridworld
from compressed_ad.tasks import point_mass as point_mass

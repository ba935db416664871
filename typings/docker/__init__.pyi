# Only what the adapters use of docker-py 7.

from docker.api.client import APIClient as APIClient

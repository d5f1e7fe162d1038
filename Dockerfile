# The same for linux/amd64 and linux/arm64: aiohttp comes as a wheel for both.
FROM python:3.13-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

RUN pip install --no-cache-dir aiohttp aiohttp-socks

WORKDIR /app
COPY flow2api.py admin.html LICENSE ./
COPY setting.toml config/
COPY extension extension/

# A user without rights outside of the data folder. Folders that are mounted here must be writable
# for the user id 1000 (see docker-compose.yml).
RUN useradd --uid 1000 --no-create-home flow2api && mkdir data && chown 1000:1000 data
USER 1000:1000

VOLUME /app/data
EXPOSE 8000

# There is no curl in this image. The port is that of the container, not the published one.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('FLOW2API_SERVER_PORT', 8000)), timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]

CMD ["python", "flow2api.py", "--config", "/app/config", "--data", "/app/data"]

# The same for linux/amd64 and linux/arm64: aiohttp comes as a wheel for both.
FROM python:3.13.12-slim-trixie

RUN pip install --no-cache-dir aiohttp==3.14.5 aiohttp-socks==0.12.0

WORKDIR /app
COPY flow2api.py admin.html setting.toml LICENSE ./
COPY extension extension/

# Whatever a setting.toml says that is mounted: the data goes to the volume, and the port that is
# published is answered.
ENV FLOW2API_SERVER_DATA_DIR=/app/data FLOW2API_SERVER_HOST=0.0.0.0
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# A user without rights outside of the data folder. A named volume takes over who owns the folder
# here; a folder of the host must be writable for the user id 1000.
RUN useradd --uid 1000 --no-create-home flow2api && mkdir data && chown 1000:1000 data
USER 1000:1000

VOLUME /app/data
EXPOSE 8000

# There is no curl in this image. The file holds the address and the port that are really used.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import http.client; c = http.client.HTTPConnection(*open('/app/data/address').read().split(), timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]

CMD ["python", "flow2api.py"]

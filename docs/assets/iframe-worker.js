// Pages opened as files may not start workers, so the search runs in a hidden frame there. Served pages are not changed.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentDocument;
      inside.open();
      inside.write(`<script>postMessage = data => parent.postMessage(data, "*")</script><script src="${url}"></script>`);
      inside.close();
      this.loaded = new Promise(resolve => (this.frame.contentWindow.onload = resolve));
      window.addEventListener("message", event => {
        if (event.source === this.frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
    }
    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}

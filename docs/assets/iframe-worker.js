// Browsers allow no workers on pages from the disk: there, the search runs in a hidden frame that acts as one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      this.ready = new Promise((resolve) => {
        const load = (address) =>
          new Promise((done) => {
            const script = inside.document.createElement("script");
            script.src = new URL(address, location.href);
            script.onload = done;
            inside.document.body.append(script);
          });
        inside.importScripts = (...addresses) => Promise.all(addresses.map(load));
        inside.postMessage = (data) => {
          const event = new MessageEvent("message", { data });
          if (this.onmessage) this.onmessage(event);
          this.dispatchEvent(event);
        };
        load(url).then(() => resolve(inside));
      });
    }

    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }

    terminate() {}
  };
}

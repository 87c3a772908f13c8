// Search from disk. A browser starts no Worker for a page of file://, so this one runs the worker's script in a hidden
// frame: there its `postMessage` reaches the page, and the page's messages reach its listeners.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.scope = new Promise((ready) => {
        frame.onload = () => {
          const scope = frame.contentWindow
          scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = scope.document.createElement("script")
          script.src = url
          script.onload = () => ready(scope)
          scope.document.head.append(script)
        }
      })
      document.body.append(frame)
      this.terminate = () => frame.remove()
    }

    postMessage(data) {
      this.scope.then((scope) => scope.dispatchEvent(new MessageEvent("message", { data })))
    }
  }

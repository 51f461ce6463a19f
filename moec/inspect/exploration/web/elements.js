
// Elements. All text goes through text nodes, so that no name is read as HTML.
export function el(tag,props={},...children){
  const e=document.createElement(tag);
  for(const[k,v]of Object.entries(props)){
    if(k==='class')e.className=v;
    else if(k==='css')Object.assign(e.style,v);
    else if(k.startsWith('on'))e.addEventListener(k.slice(2),v);
    else if(v===true)e.setAttribute(k,'');
    else if(v!==false&&v!==undefined)e.setAttribute(k,v);
  }
  e.append(...children.filter(c=>c!==null&&c!==undefined).map(c=>c instanceof Node?c:String(c)));
  return e;
}
export const link=(text,act)=>el('button',{class:'link',type:'button',onclick:act},text);
export const plural=(n,noun)=>`${n.toLocaleString('en')} ${noun}${n===1?'':'s'}`;
export const bytes=n=>n<1e3?`${n} B`:n<1e6?`${(n/1e3).toFixed(1)} kB`:n<1e9?`${(n/1e6).toFixed(1)} MB`:`${(n/1e9).toFixed(2)} GB`;
export const big=n=>n===null||n===undefined?'':n>=1e9?`${(n/1e9).toFixed(2)} G`:n>=1e6?`${(n/1e6).toFixed(2)} M`:n>=1e3?`${(n/1e3).toFixed(1)} k`:n.toFixed(0);
export const time=s=>s>=1?`${s.toFixed(2)} s`:s>=1e-3?`${(s*1e3).toFixed(2)} ms`:`${(s*1e6).toFixed(1)} us`;
export const percent=x=>`${(100*x).toFixed(x<0.0995?1:0)} %`;
export function facts(pairs){
  const list=el('dl');
  for(const[name,value]of pairs)if(value!==''&&value!==null&&value!==undefined&&value!==false)
    list.append(el('dt',{},name),el('dd',{},...(Array.isArray(value)?value:[value])));
  return list;
}
// Rows in chunks: the next ones are rendered when the end of the list comes near.
export const CHUNK=150;
export function chunks(box,count,make,first=CHUNK){
  let done=0;
  const end=el('div',{class:'soft small'});
  box.append(end);
  function more(until){
    const part=document.createDocumentFragment();
    for(until=Math.min(count,until);done<until;done++)part.append(make(done));
    end.before(part);
    if(done>=count){watch.disconnect();end.remove()}
  }
  const watch=new IntersectionObserver(es=>{if(es.some(e=>e.isIntersecting))more(done+CHUNK)},{rootMargin:'800px'});
  more(first);
  if(done<count)watch.observe(end);
  return more;
}
export function table(columns,rows,cells){
  const body=el('tbody');
  const head=columns.map(c=>el('th',{class:c[0]==='#'?'n':'',scope:'col'},c.replace('#','')));
  chunks(body,rows.length,i=>el('tr',{},...cells(rows[i]).map((c,n)=>el('td',{class:columns[n][0]==='#'?'n':''},c))));
  return el('div',{class:'scroll'},el('table',{},el('thead',{},el('tr',{},...head)),body));
}
export const meter=share=>el('span',{class:'meter',css:{width:`${Math.max(1,Math.min(1,share)*90)}px`}});
